"""GGUF files: config and weights as Hugging Face has them, dequantised tensor by tensor when they are read."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from paged.files import Tensor, Weights

from .extra import package
from .gguf_config import config_of
from .gguf_header import Blocks, read_header
from .gguf_rows import ROWS, Row, hugging_face_name

_PLAIN = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # the config has them


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened.

    * ``config``: in the form of Hugging Face's config.json.
    * ``weights``: under Hugging Face's names.
    * ``metadata``: of a GGUF file, all that it says; of a folder, nothing.
    * ``path``: of the folder or the file.
    """

    config: dict[str, Any]
    weights: Weights
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    path: pathlib.Path = pathlib.Path()


def open_gguf(path: str | os.PathLike) -> Checkpoint:
    """A GGUF file of a Llama, SmolLM, Qwen, Gemma, gpt-oss or Phi model. Nothing but its header is read.

    Blocks of quantised numbers are dequantised to float32 when a tensor is read. Weights are given back their places:
    the rows of q and k that such files interleave, the 1 that they add to norms of Gemma, and the experts of gpt-oss.

    **Arguments:**

    * ``path``: the file.

    **Returns:** `Checkpoint`.

    Raises ``FileNotFoundError`` if there is no such file, ``ModuleNotFoundError`` without the extra ``models``, and
    ``ValueError``, which names the file and the tensor or key, if the file is cut off, lies about itself, or says
    something about the model that is not known.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "model.gguf"
    ...     _ = path.write_bytes(b"GGUF" + b"\\x07" + bytes(19))
    ...     try:
    ...         open_gguf(path)
    ...     except ValueError as error:
    ...         print(str(error).replace(folder, "folder"))
    folder/model.gguf: GGUF of version 7, and versions 2 and 3 are read.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too few for a GGUF file.")
    raw = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    header = read_header(path, raw)
    architecture = header.metadata.get("general.architecture")
    if architecture not in ROWS:
        raise ValueError(f"{path}: general.architecture is {str(architecture)[:100]!r}; known are {', '.join(ROWS)}.")
    if header.metadata.get("split.count", 1) != 1:
        raise ValueError(
            f"{path}: it is one of {header.metadata['split.count']} parts. Merge them into one file first."
        )
    row = ROWS[architecture]
    tensors = {blocks.name: _tensor(path, blocks, raw) for blocks in header.tensors}
    config = config_of(path, architecture, row, header.metadata, tensors)
    return Checkpoint(config, _weights(path, row, config, tensors), header.metadata, path)


def _tensor(path: pathlib.Path, blocks: Blocks, raw: np.ndarray) -> Tensor:
    """A tensor as the file has it. ``load`` also takes arrays of indices, but for the last dimension."""
    data = raw[blocks.begin : blocks.end]
    if blocks.kind in _PLAIN:
        dtype = _PLAIN[blocks.kind]
        array = data.view(dtype).reshape(blocks.shape)
        return Tensor(blocks.name, blocks.shape, dtype, path, lambda index: array[(*index, ...)])
    gguf = package("gguf")
    kind, rows = gguf.GGMLQuantizationType[blocks.kind], data.reshape(*blocks.shape[:-1], blocks.row_bytes)
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise ValueError(f"{path}: tensor {blocks.name!r} has blocks of {blocks.kind}, which are not read.") from None

    def load(index: tuple[Any, ...]) -> np.ndarray:
        part = rows[index[: rows.ndim - 1]]  # only the bytes of these rows are touched
        if not part.size:
            numbers = np.zeros((*part.shape[:-1], blocks.shape[-1]), np.float32)
        else:
            numbers = gguf.dequantize(part, kind).reshape(*part.shape[:-1], blocks.shape[-1])
        return numbers[(..., *index[rows.ndim - 1 :])]

    return Tensor(blocks.name, blocks.shape, np.dtype(np.float32), path, load)


def _weights(path: pathlib.Path, row: Row, config: dict[str, Any], tensors: dict[str, Tensor]) -> Weights:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, tensor in tensors.items():
        if name in _FACTORS:
            continue
        new = hugging_face_name(row, name)
        if new is None:
            raise ValueError(f"{path}: tensor {name!r} is not one that {row.model_class} has.")
        part = name.split(".")[-2]
        if row.has_permuted_heads and part in heads:
            tensor = _with_heads_in_halves(tensor, heads[part])
        if row.norm_offset and part.endswith("norm"):
            tensor = dataclasses.replace(tensor, load=_minus(tensor.load, row.norm_offset))
        weights[new] = dataclasses.replace(tensor, name=new)
    return Weights(_with_joined_experts(path, weights).values())


def _minus(load: Callable[..., np.ndarray], offset: float) -> Callable[..., np.ndarray]:
    return lambda index: load(index) - np.float32(offset)


def _with_heads_in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows in the order of Hugging Face.

    A rotary embedding turns pairs of a head's numbers. Hugging Face pairs number i with number i + half; such files
    pair number 2 i with 2 i + 1, and have their rows in that order.
    """
    rows = tensor.shape[0]
    if rows % (2 * heads):
        raise ValueError(f"{tensor.file}: tensor {tensor.name!r} has {rows} rows, no multiple of twice {heads} heads.")
    order = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def load(index: tuple[slice, ...]) -> np.ndarray:
        rows: Any = order[index[0]] if index else order
        return tensor.load((rows, *index[1:]))

    return dataclasses.replace(tensor, load=load)


def _with_joined_experts(path: pathlib.Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts of gpt-oss: gate and up as the even and odd columns of one tensor, and products as ``x @ weight``."""
    joined = {}
    for name, tensor in weights.items():
        found = re.fullmatch(r"(.*\.experts)\.(gate|up|down)_proj\.(weight|bias)", name)
        if found is None:
            joined[name] = tensor
        elif found[2] == "down":
            suffix = "" if found[3] == "weight" else "_bias"
            joined[f"{found[1]}.down_proj{suffix}"] = _turned(tensor, f"{found[1]}.down_proj{suffix}")
        elif found[2] == "gate":
            other = weights.get(f"{found[1]}.up_proj.{found[3]}")
            if other is None or other.shape != tensor.shape:
                raise ValueError(f"{path}: tensor {name!r} has no up_proj of its shape, {tensor.shape}.")
            new = f"{found[1]}.gate_up_proj{'' if found[3] == 'weight' else '_bias'}"
            joined[new] = _interleaved(_turned(tensor, new), _turned(other, new))
        elif f"{found[1]}.gate_proj.{found[3]}" not in weights:
            raise ValueError(f"{path}: tensor {name!r} has no gate_proj beside it.")
    return joined


def _turned(tensor: Tensor, name: str) -> Tensor:
    """Experts' matrices [experts, out, in] as [experts, in, out]; their biases as they are."""
    if len(tensor.shape) != 3:
        return dataclasses.replace(tensor, name=name)

    def load(index: tuple[slice, ...]) -> np.ndarray:
        experts, inner, outer = (*index, *(slice(None),) * (3 - len(index)))
        return tensor.load((experts, outer, inner)).swapaxes(1, 2)

    experts, outer, inner = tensor.shape
    return dataclasses.replace(tensor, name=name, shape=(experts, inner, outer), load=load)


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """Two tensors as the even and odd columns of one."""

    def load(index: tuple[slice, ...]) -> np.ndarray:
        leading, last = index[: len(even.shape) - 1], index[len(even.shape) - 1 :]
        both = np.stack([even.load(leading), odd.load(leading)], axis=-1)
        return both.reshape(*both.shape[:-2], -1)[(..., *last)]

    return dataclasses.replace(even, shape=(*even.shape[:-1], 2 * even.shape[-1]), load=load)
