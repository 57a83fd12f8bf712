"""The same attention on every lowering that accepts it, interpreted where there is no device for it."""

import dataclasses
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from paged.lower import LOWERINGS, Attend, DecodeSchedule, Program, lower
from paged.spec import AttentionSpec, PageLayout


def interpreted(attend: Attend, **settings: Any) -> Attend:
    """An attention whose kernels run in Pallas's interpreter of TPU kernels, at its strictest.

    Memory that nothing has written is NaN, a read out of bounds raises, and races are looked for and printed.

    **Arguments:**

    - `attend`: an attention of a kernel's target. On a target without kernels it stays as it is.
    - `settings`: fields of ``pltpu.InterpretParams`` that shall differ.

    **Returns:** the attention.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> interpreted(paged.lower(spec, layout, "tpu")).lowering.is_interpreted
    True
    """
    params = pltpu.InterpretParams(
        **{"detect_races": True, "uninitialized_memory": "nan", "out_of_bounds_reads": "raise", **settings}
    )
    lowerings = tuple(low if low.target == "xla" else low.interpreted(params) for low in attend.lowerings)
    return dataclasses.replace(attend, lowerings=lowerings)


def across_targets(spec: AttentionSpec, layout: PageLayout) -> dict[str, Attend]:
    """Every way in which this library runs an attention, by name.

    **Arguments:**

    - `spec`, `layout`: of the attention.

    **Returns:** an attention for each lowering that accepts the spec and the layout; the decode kernel twice, with its
    sequences inline and on the grid. Kernels without a device are `interpreted`.

    **Raises:** ``ValueError`` with each lowering's reason, where none accepts.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> list(across_targets(spec, PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32)))
    ['tpu-decode inline', 'tpu-decode grid', 'tpu-ragged', 'xla-blocks']
    """
    program, found, reasons = Program.from_spec(spec), {}, []
    for lowering in LOWERINGS:
        reason = lowering.refuses(program, layout)
        if reason is not None:
            reasons.append(f"{lowering.name}: {reason}")
            continue
        own = lowering.schedule(program, layout)
        forms = {lowering.name: own}
        if isinstance(own, DecodeSchedule):
            forms = {f"{lowering.name} {kind}": own.replace(sequence=kind) for kind in ("inline", "grid")}
        for name, schedule in forms.items():
            attend = lower(spec, layout, lowering.target, schedule=schedule)
            found[name] = attend if lowering.target in ("xla", jax.default_backend()) else interpreted(attend)
    if not found:
        raise ValueError(f"No lowering accepts this spec over this layout: {'; '.join(reasons)}.")
    return found
