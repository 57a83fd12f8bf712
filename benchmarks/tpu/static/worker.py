"""The child process: trace, lower and compile one call for a TPU generation, and say how that went."""

import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from .scalars import kernel_scalars

_DEVICE_MODULES = ("jax._src.tpu_info", "jax._src.pallas.mosaic.tpu_info")  # where Pallas asks for the device
_LONGEST_ERROR, _ERROR_HEAD, _ERROR_TAIL = 4000, 2500, 1400


def main(task_path: str) -> None:
    """Do the task in the file: write ``result`` (JSON), ``program``, and ``scalars`` (npz) where they are asked for."""
    task = json.loads(pathlib.Path(task_path).read_text())
    result: dict[str, Any] = {"ok": False}
    try:
        _compile(task, result)
    except BaseException as error:  # whatever it is, the parent reports it
        result["error"] = _described(error)
    pathlib.Path(task["result"]).write_text(json.dumps(result))


def builder(target: str, folder: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` or ``module:name`` names; modules are also found in ``folder``."""
    where, _, name = target.rpartition(":")
    if where.endswith(".py"):
        path = pathlib.Path(where)
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{where} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, folder)
        module = importlib.import_module(where)
    return getattr(module, name)


def _compile(task: dict[str, Any], result: dict[str, Any]) -> None:
    devices = list(topologies.get_topology_desc(task["topology"], platform="tpu").devices)
    _answer_with(devices)
    device = devices[0]
    result |= {
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "kind": device.device_kind,
        "num_cores": device.num_cores,
    }
    function, args, *donated = builder(task["target"], task["folder"])(**task["kwargs"])
    placed = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None) or placed),
        args,
        is_leaf=lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    )
    lowered = jax.jit(function, donate_argnums=donated[0] if donated else ()).lower(*shapes)
    start = time.perf_counter()
    compiled = lowered.compile()
    result["compile_seconds"] = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    result["temporary_bytes"] = memory.temp_size_in_bytes
    pathlib.Path(task["program"]).write_text(compiled.as_text() or "")  # it has the compiler's estimates of cycles
    result["ok"] = True
    if task["scalars"]:
        found = kernel_scalars(function, args)
        keyed: dict[str, Any] = {
            f"{i}:{name}|{k}": v for i, (name, values, _) in enumerate(found) for k, v in values.items()
        }
        np.savez(task["scalars"], **keyed)


def _answer_with(devices: list[Any]) -> None:
    """Kernels choose block sizes by the device that they run on: answer with the one that is compiled for."""
    answers = {"devices": lambda *_, **__: devices, "default_backend": lambda: "tpu"}
    for name, answer in (*answers.items(), ("local_devices", answers["devices"])):
        mock.patch.object(jax, name, answer).start()
    for name in _DEVICE_MODULES:
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            for question, answer in (("get_device_kind", "device_kind"), ("get_num_device_cores", "num_cores")):
                value = getattr(devices[0], answer)
                mock.patch.object(module, question, lambda value=value: value, create=True).start()


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    where = "; ".join(f"{pathlib.Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames)
    text = f"{type(error).__name__}: {error} [{where}]"
    return text if len(text) < _LONGEST_ERROR else f"{text[:_ERROR_HEAD]} ... {text[-_ERROR_TAIL:]}"


if __name__ == "__main__":
    main(sys.argv[1])
