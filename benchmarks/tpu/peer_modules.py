"""How peers' modules are imported where they can be."""

import importlib
import importlib.util
import logging
import sys
import types
from typing import Any

import jax

_TPU_INFERENCE = "tpu_inference.kernels.ragged_paged_attention.v3"
# What tpu-inference calls the chips; its tables of block sizes go by these names.
_DEVICE_NAMES = {"TPU v5 lite": "TPU v5e", "TPU v6 lite": "TPU v6e", "TPU7x": "TPU v7"}


def tpu_inference(name: str) -> Any:
    """A kernel's module, found in the installed package without running the package, which would want vLLM.

    The kernels need two names of it beside their own folder: a logger and the device's name.
    """
    if "tpu_inference" not in sys.modules:
        found = importlib.util.find_spec("tpu_inference")
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError("not importable: `pip install --no-deps tpu-inference`")
        package = types.ModuleType("tpu_inference")
        package.__path__ = list(found.submodule_search_locations)
        logger, utils = (types.ModuleType(f"tpu_inference.{part}") for part in ("logger", "utils"))
        vars(logger)["init_logger"] = _Logger
        vars(utils)["get_device_name"] = _device_name
        for module in (package, logger, utils):
            sys.modules[module.__name__] = module
    return importlib.import_module(f"{_TPU_INFERENCE}.{name}")


class _Logger(logging.Logger):
    """A logger with the two methods that vLLM adds."""

    warning_once = logging.Logger.warning
    info_once = logging.Logger.info


def _device_name(num_devices: int | None = None) -> str:
    kind = jax.devices()[0].device_kind
    name = str(_DEVICE_NAMES.get(kind, kind))
    return name if num_devices is None else f"{name}-{num_devices}"
