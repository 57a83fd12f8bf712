"""Safetensors files, read by memory map and written: 8 bytes of size, a header of JSON, then raw arrays.

The format is public: https://huggingface.co/docs/safetensors. A header says of every tensor its dtype, its shape and
where its bytes are. Everything that it says is checked against the file's true size before anything is allocated.
"""

import itertools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from .json_text import parse_object
from .weights import Tensor, Weights

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_ALIGNMENT = 64  # where arrays begin in a file that we write: XLA on CPU uses aligned memory without a copy

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FOUR_BITS = "F4"  # two numbers of float4_e2m1fn in a byte, the first in the low bits


def open_safetensors(path: str | os.PathLike) -> Weights:
    """The tensors of a safetensors file, or of a folder of them. Nothing but headers is read.

    **Arguments:**

    * ``path``: a file, or a folder in Hugging Face's form. Of a folder, ``model.safetensors.index.json`` says which
      files belong to the model. Without one, it is ``model.safetensors``, or the only such file that is there.

    **Returns:** `Weights`, by the names of the files.

    Raises ``FileNotFoundError`` if there is no such file, and ``ValueError``, which names the file and the tensor, if
    a file is cut off or lies about itself. Checkpoints that need ``pickle`` are never read.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(folder + "/model.safetensors", {"a": np.arange(6.0).reshape(2, 3)})
    ...     open_safetensors(folder)["a"].read((slice(1, 2),))
    array([[3., 4., 5.]])
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    if (path / INDEX).is_file():
        return _open_shards(path, path / INDEX)
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in found or len(found) == 1:
        return _open_file(path / (SINGLE if SINGLE in found else found[0]))
    if found:
        raise ValueError(f"{path} holds {', '.join(found)} and no {INDEX} that says which belong to the model.")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    advice = f" Its {pickled[0]} needs pickle, which runs code: convert it to safetensors first." if pickled else ""
    raise FileNotFoundError(f"{path} holds no safetensors file.{advice}")


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays to one safetensors file, which appears whole or not at all.

    **Arguments:**

    * ``path``: the file. One that exists is replaced when the new one is complete.
    * ``tensors``: arrays of NumPy or JAX by name. They are converted one by one, so that memory holds one at a time.
    * ``metadata``: text by name. By default ``{"format": "pt"}``, which ``transformers`` asks for.

    Raises ``TypeError`` if a dtype has no name in the format.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_safetensors(folder + "/a.safetensors", {"x": jnp.ones(2, jnp.bfloat16)}, {"of": "me"})
    ...     weights = open_safetensors(folder)
    ...     weights["x"].read(), weights.metadata
    (array([1, 1], dtype=bfloat16), {'of': 'me'})
    """
    path = pathlib.Path(path)
    # Widest numbers first, so that each array begins at a multiple of its own item size.
    names = sorted(tensors, key=lambda name: (-_dtype_of(name, tensors[name]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    end = 0
    for name in names:
        if name == "__metadata__":
            raise ValueError("A tensor must not have the name '__metadata__', which the format uses itself.")
        dtype, shape = _dtype_of(name, tensors[name]), [int(extent) for extent in np.shape(tensors[name])]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                # Through a view of bytes: NumPy's own files have no bfloat16.
                file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _dtype_of(name: str, array: Any) -> np.dtype:
    dtype = getattr(array, "dtype", None)
    try:
        known = dtype is not None and np.dtype(dtype) in _NAMES
    except TypeError:  # such as the dtype of JAX's typed keys
        known = False
    if not known:
        raise TypeError(
            f"tensors[{name!r}] must be an array of one of {', '.join(map(str, _NAMES))}; got "
            f"{type(array).__name__ if dtype is None else dtype}."
        )
    return np.dtype(dtype)


def _open_shards(folder: pathlib.Path, index: pathlib.Path) -> Weights:
    places = parse_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: weight_map must say the file of every tensor by name.")
    tensors, metadata = [], {}
    for name in sorted(set(places.values())):
        if pathlib.PurePath(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{index}: weight_map names the file {name!r}, which is not one of its own folder.")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there. Is the download complete?")
        shard = _open_file(folder / name)
        metadata.update(shard.metadata)
        for tensor in shard.values():
            if places.get(tensor.name) != name:
                raise ValueError(
                    f"{folder / name}: holds tensor {tensor.name!r}, and the index says that it is in "
                    f"{places.get(tensor.name, 'no file')}."
                )
            tensors.append(tensor)
    weights = Weights(tensors, metadata)
    missing = sorted(places.keys() - weights.keys())
    if missing:
        raise ValueError(f"{folder / places[missing[0]]}: tensor {missing[0]!r} of the index is not in it.")
    return weights


def _open_file(path: pathlib.Path) -> Weights:
    header, start, size = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map names to text.")
    places = {name: _place(path, name, entry, size - start) for name, entry in header.items()}
    _require_no_gaps(path, places, size - start)
    mapped = np.memmap(path, np.uint8, mode="r")
    tensors = []
    for name, (begin, end) in places.items():
        tensors.append(_tensor(path, name, header[name], mapped[start + begin : start + end]))
    return Weights(tensors, metadata)


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """The header, the byte after it, and the size of the file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"{path}: {size} bytes are too few for a safetensors file, which begins with 8.")
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, size - 8):
            raise ValueError(
                f"{path}: it says that its header has {length} bytes, and the file has {size - 8} after that number "
                f"(a header may have {_LONGEST_HEADER}). It is cut off, or no safetensors file."
            )
        text = file.read(length)
    return parse_object(path, text), 8 + length, size


def _place(path: pathlib.Path, name: str, entry: Any, size: int) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, behind the header: checked against its dtype, its shape and the file."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must be described by dtype, shape and data_offsets; got {str(entry)[:100]}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in _DTYPES and dtype != _FOUR_BITS):
        raise ValueError(f"{where} has dtype {str(dtype)[:40]!r}; known are {', '.join((*_DTYPES, _FOUR_BITS))}.")
    # An empty array may have other extents of any size, and NumPy makes none of more than 2^63 bytes.
    if not _are_counts(shape) or len(shape) > 32 or math.prod(filter(None, shape)) >= 2**59:
        raise ValueError(
            f"{where} has shape {str(shape)[:100]}, which must be a few whole numbers, 0 or more, that an array can "
            "have."
        )
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise ValueError(
            f"{where} has data_offsets {str(offsets)[:100]}, which must be a begin and an end within the {size} bytes "
            "after the header."
        )
    bits = 4 if dtype == _FOUR_BITS else 8 * _DTYPES[dtype].itemsize
    if bits * math.prod(shape) != 8 * (offsets[1] - offsets[0]) or (dtype == _FOUR_BITS and shape and shape[-1] % 2):
        raise ValueError(
            f"{where} of dtype {dtype} and shape {str(shape)[:100]} needs {str(bits * math.prod(shape) / 8)[:40]} "
            f"bytes, and its data_offsets {offsets} give it {offsets[1] - offsets[0]}."
        )
    return offsets[0], offsets[1]


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _require_no_gaps(path: pathlib.Path, places: dict[str, tuple[int, int]], size: int) -> None:
    """Tensors must follow each other, from the header to the end of the file: none overlap, and no byte is hidden."""
    ordered = sorted(places.items(), key=lambda item: item[1])
    for (before, (_, end)), (name, (begin, _)) in itertools.pairwise(ordered):
        if begin != end:
            what = "overlaps" if begin < end else "leaves a gap after"
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {begin} and {what} {before!r}, which ends at {end}."
            )
    first, last = (ordered[0][1][0], ordered[-1][1][1]) if ordered else (0, 0)
    if first != 0 or last != size:
        raise ValueError(f"{path}: tensors fill bytes {first} to {last}, and the file has bytes 0 to {size} for them.")


def _tensor(path: pathlib.Path, name: str, entry: dict[str, Any], raw: np.ndarray) -> Tensor:
    shape = tuple(entry["shape"])
    if entry["dtype"] == _FOUR_BITS:
        pairs = raw.reshape(*shape[:-1], shape[-1] // 2)
        return Tensor(name, shape, np.dtype(ml_dtypes.float4_e2m1fn), path, _four_bits(pairs))
    dtype = _DTYPES[entry["dtype"]]
    array = raw.view(dtype).reshape(shape).view(np.ndarray)
    return Tensor(name, shape, dtype, path, lambda index: array[(*index, ...)])


def _four_bits(pairs: np.ndarray) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A reader of numbers that lie two to a byte. Only the bytes of the rows asked for are touched."""

    def load(index: tuple[slice, ...]) -> np.ndarray:
        leading, last = index[: pairs.ndim - 1], index[pairs.ndim - 1 :]
        part = pairs[leading]
        both = np.stack([part & 15, part >> 4], axis=-1).reshape(*part.shape[:-1], -1)
        return both.view(ml_dtypes.float4_e2m1fn)[(..., *last)]

    return load
