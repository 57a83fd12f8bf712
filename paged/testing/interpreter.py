"""`interpreted` and `watched`: kernels in Pallas's interpreters, and what these see, as failures by name.

What differs between versions of JAX, and what has no public name there, stands in this file alone.
"""

import contextlib
import dataclasses
import importlib
import io
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call, race_detection_state
from jax.experimental.pallas import tpu as pltpu

from paged.lower import Attend

from .failures import CheckFailure

KERNEL_CHECKS = {
    "no races": "Something orders every access to memory with every write to the same place.",
    "semaphores end at zero": "Every copy that was started is waited for, once.",
    "barriers are awaited": "On a GPU, nothing arrives at a barrier again before its last completion was awaited.",
    "in bounds": "No access leaves its buffer.",
    "kernels end": "No kernel waits for what never comes.",
}
"""What a kernel that is `watched` promises, by the name of the failure."""

PATIENCE = 300.0  # seconds that a kernel of a few pages may run; on a busy machine, unoptimised, some take 60
# What the interpreter says, and the failure that it is. Its race detector compares only accesses that nothing orders,
# and it fails with "_slices_overlap" where one of them has a stride.
_SAID = (
    ("RACE DETECTED", "no races"),
    ("_slices_overlap", "no races"),
    ("non-zero count", "semaphores end at zero"),
    ("no threads observed phase", "barriers are awaited"),
    ("barrier is already at phase", "barriers are awaited"),
    ("Out-of-bounds", "in bounds"),
    ("is_range_out_of_bounds_for_shape", "in bounds"),  # it asserts that no index is negative
    ("did not end in", "kernels end"),
)


class _Interpreter(NamedTuple):
    """One of Pallas's interpreters: the module that holds its state, and the name of what it has seen of races there.

    That is None until a kernel is interpreted.
    """

    module: Any
    name: str
    reset: Callable[[], None]

    @property
    def races(self) -> Any:
        """What it has seen of races; None where it has interpreted nothing."""
        return getattr(self.module, self.name, None)

    @property
    def memory(self) -> Any:
        """The memory of the kernel that runs, if any."""
        return getattr(self.module, "_shared_memory", None)

    def forget(self) -> None:
        """Forget races of earlier kernels."""
        setattr(self.module, self.name, None)


_TPU = _Interpreter(interpret_pallas_call, "races", pltpu.reset_tpu_interpret_mode_state)
_INTERPRETERS = [_TPU]
_GPU_PARAMS: Any = None
# Before JAX 0.12, `mosaic_gpu` has no interpreter, and cannot be imported without a package that JAX does not bring.
if jax.__version_info__ >= (0, 12):
    _CALLBACKS = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    _GPU_PARAMS = importlib.import_module("jax.experimental.pallas.mosaic_gpu").InterpretGPUParams
    _INTERPRETERS.append(_Interpreter(_CALLBACKS, "_races", _CALLBACKS.reset_gpu_interpret_mode_state))


def interpret_params(mode: str = "on_wait", cores: int = 1, **settings: Any) -> pltpu.InterpretParams:
    """Settings of Pallas's interpreter of TPU kernels at its strictest, for ``pl.pallas_call(..., interpret=)``.

    Memory that nothing has written is NaN, an access out of bounds raises, and races are looked for.

    **Arguments:**

    - `mode`: when a copy moves its data. ``"on_wait"``: when it is waited for, so that what is read too early is still
      NaN. ``"eager"``: when it starts, so that what is overwritten too early is lost.
    - `cores`: cores of the chip.
    - `settings`: other fields of ``pltpu.InterpretParams``.

    **Returns:** the settings.

    >>> interpret_params().uninitialized_memory
    'nan'
    """
    # From JAX 0.12 on the interpreter can raise at a race. `watched` reads what it says of races in all versions.
    has_on_race = any(field.name == "on_race" for field in dataclasses.fields(pltpu.InterpretParams))
    strictest: dict[str, Any] = {
        "dma_execution_mode": mode,
        "detect_races": True,
        "uninitialized_memory": "nan",
        "out_of_bounds_reads": "raise",
        "num_cores_or_threads": cores,
        **({"on_race": "warn"} if has_on_race else {}),
    }
    return pltpu.InterpretParams(**{**strictest, **settings})


def interpret_gpu_params(**settings: Any) -> Any:
    """Settings of Pallas's interpreter of GPU kernels at its strictest, as `interpret_params` has those for TPUs.

    It knows no missing fence: that the matrix unit and the copies may not see what threads have stored.

    **Arguments:**

    - `settings`: fields of ``jax.experimental.pallas.mosaic_gpu.InterpretGPUParams``.

    **Returns:** the settings. Raises ``ValueError`` before JAX 0.12, which has the first such interpreter.

    >>> interpret_gpu_params().uninitialized_memory if jax.__version_info__ >= (0, 12) else "nan"
    'nan'
    """
    if _GPU_PARAMS is None:
        raise ValueError(f"The interpreter of GPU kernels needs JAX 0.12 or later; this is {jax.__version__}.")
    strictest = {"detect_races": True, "on_race": "warn", "uninitialized_memory": "nan", "out_of_bounds_reads": "raise"}
    return _GPU_PARAMS(**{**strictest, **settings})


def interpreted(attend: Attend, mode: str = "on_wait", **settings: Any) -> Attend:
    """An attention whose kernels run in Pallas's interpreter of TPU or of GPU kernels, at its strictest.

    What the interpreter sees becomes a failure where `watched` runs the call, as `check_lowering` does.

    **Arguments:**

    - `attend`: an attention of a kernel's target. On a target without kernels it stays as it is.
    - `mode`, `settings`: see `interpret_params`, where the number of cores is the schedule's. GPU kernels have no mode:
      a copy moves its data at any time. See `interpret_gpu_params`.

    **Returns:** the attention.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> interpreted(paged.lower(spec, layout, "tpu")).lowering.is_interpreted
    True
    """

    def params(target: str) -> Any:
        if target == "gpu":
            return interpret_gpu_params(**settings)
        return interpret_params(mode, getattr(attend.schedule, "cores", 1), **settings)

    lowerings = (low.interpreted(params(low.target)) if low.has_kernels else low for low in attend.lowerings)
    return dataclasses.replace(attend, lowerings=tuple(lowerings))


def watched(run: Callable[..., Any], *args: Any, patience: float = PATIENCE, must_interpret: bool = False) -> Any:
    """The finished results of ``run(*args)``, whose interpreted kernels keep every promise of `KERNEL_CHECKS`.

    **Arguments:**

    - `run`, `args`: a call. Without an interpreted kernel in it, it is only run.
    - `patience`: seconds that one kernel may run. Compiling it does not count.
    - `must_interpret`: whether a call without an interpreted kernel is a failure.

    **Returns:** what ``run`` returns, when it is there.

    **Raises:** `CheckFailure` named ``"no races"``, ``"semaphores end at zero"``, ``"in bounds"`` or ``"kernels end"``,
    with what the interpreter says; and whatever else ``run`` raises.

    >>> from jax.experimental import pallas as pl
    >>> def double(x_ref, out_ref):
    ...     out_ref[...] = 2 * x_ref[...]
    >>> shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    >>> run = pl.pallas_call(double, out_shape=shape, interpret=interpret_params())
    >>> float(watched(run, jnp.ones((8, 128)), must_interpret=True)[0, 0])
    2.0
    """
    said, done = io.StringIO(), threading.Event()
    for interpreter in _INTERPRETERS:
        interpreter.forget()
    guard = threading.Thread(target=_stop_when_stuck, args=(done, patience), daemon=True)
    guard.start()
    try:
        with _listening(said):
            results = jax.block_until_ready(run(*args))
            jax.effects_barrier()
    except BaseException as error:
        for interpreter in _INTERPRETERS:
            if interpreter.races is not None:
                interpreter.reset()
                if not isinstance(error, CheckFailure):  # a call inside of this one may have been watched itself
                    _name_what_was_said(str(error), error)
        raise
    finally:
        done.set()
        guard.join()
    seen = [interpreter.races for interpreter in _INTERPRETERS if interpreter.races is not None]
    if not seen and must_interpret:
        raise CheckFailure("interpreted", "no kernel was interpreted, so nothing was watched.")
    if any(races.races_found for races in seen):  # before what is said: JAX 0.12 logs a race where nobody listens
        where = said.getvalue()[:1000].strip()
        raise CheckFailure("no races", where or "the interpreter has found a race; JAX has logged where.")
    _name_what_was_said(said.getvalue())
    return results


@contextlib.contextmanager
def _listening(said: io.StringIO) -> Iterator[None]:
    """What the interpreter prints or, from JAX 0.12 on, logs of races goes to ``said``."""
    logger = getattr(race_detection_state, "logger", None)
    handler = logging.StreamHandler(said)
    if logger is not None:
        logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            # The interpreter of GPU kernels multiplies by NumPy, which warns of NaN in memory that nobody has written.
            warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
            yield
    finally:
        if logger is not None:
            logger.removeHandler(handler)


def _name_what_was_said(text: str, error: BaseException | None = None) -> None:
    for words, check in _SAID:
        if words in text:
            raise CheckFailure(check, text[:1000].strip()) from error


def _stop_when_stuck(done: threading.Event, patience: float) -> None:
    """Fail a kernel that has run for too long; compiling it does not count."""
    memory, since = None, time.monotonic()
    while not done.wait(0.2):
        running = next((one.memory for one in _INTERPRETERS if one.memory is not None), None)
        if running is not memory:
            memory, since = running, time.monotonic()
        if memory is not None and time.monotonic() - since > patience:
            memory.set_failed(TimeoutError(f"the kernel did not end in {patience} s"), top_level=False)
            return
