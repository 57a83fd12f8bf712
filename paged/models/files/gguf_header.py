"""What the beginning of a GGUF file says: metadata by name, and where tensors lie. Every claim is checked at once.

The format is public: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file holds metadata, a list of
tensors, and their blocks of numbers. A count or a length that the rest of the file has no room for is refused before
anything of that size is allocated.
"""

import dataclasses
import itertools
import math
import pathlib
import struct
from typing import Any

import numpy as np

from .extra import package

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_LEAST_ENTRY, _LEAST_TENSOR = 13, 32  # the fewest bytes of an entry of metadata, and of the list of tensors


@dataclasses.dataclass(frozen=True)
class Blocks:
    """One tensor of the file: its numbers come in blocks, along the last dimension.

    * ``shape``: of the numbers, outermost dimension first.
    * ``kind``: the name of the block type, such as ``"Q4_1"``.
    * ``begin``, ``end``: its bytes in the file.
    * ``row_bytes``: of the last dimension.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    begin: int
    end: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """``metadata`` by name: numbers, text, and lists of them. ``tensors`` in the order of the file."""

    metadata: dict[str, Any]
    tensors: list[Blocks]


def read_header(path: pathlib.Path, raw: np.ndarray) -> Header:
    """The header of a file, given as all of its bytes. Raises ``ValueError``, which names the file."""
    cursor = _Cursor(path, raw)
    if bytes(raw[:4]) != b"GGUF":
        raise ValueError(f"{path}: it begins with {bytes(raw[:4])!r}, and a GGUF file with b'GGUF'.")
    cursor.at = 4
    version = cursor.number("<u4", "its version")
    if version not in _VERSIONS:
        big = " Its numbers are big-endian, which is not read." if version and version & 0xFFFF == 0 else ""
        raise ValueError(f"{path}: GGUF of version {version}, and versions 2 and 3 are read.{big}")
    tensors = cursor.count("its number of tensors", _LEAST_TENSOR)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("its number of metadata entries", _LEAST_ENTRY)):
        name = cursor.text("a name of metadata")
        if name in metadata:
            raise ValueError(f"{path}: metadata {name!r} stands twice.")
        metadata[name] = cursor.value(f"metadata {name!r}", cursor.number("<u4", f"the type of {name!r}"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment must be a power of two; got {alignment!r}.")
    listed = [_listed(cursor) for _ in range(tensors)]
    start = -(-cursor.at // alignment) * alignment
    kinds = {kind.value: (kind.name, *sizes) for kind, sizes in package("gguf").constants.GGML_QUANT_SIZES.items()}
    blocks = [_placed(path, entry, kinds, start, alignment, raw.size) for entry in listed]
    _require_apart(path, blocks)
    return Header(metadata, blocks)


class _Cursor:
    """Reads values one after the other, and nothing that the file has no room for."""

    def __init__(self, path: pathlib.Path, raw: np.ndarray):
        self.path, self.raw, self.at = path, raw, 0
        self._view = raw.data

    def take(self, size: int, what: str) -> memoryview:
        """The next bytes."""
        left = self.raw.size - self.at
        if size > left:
            raise ValueError(
                f"{self.path}: {what} needs {size} bytes from byte {self.at}, and {left} are left. "
                "The file is cut off, or lies about its size."
            )
        self.at += size
        return self._view[self.at - size : self.at]

    def number(self, dtype: str, what: str) -> Any:
        """The next number, as one of Python's. Of float32 the shortest that rounds to it: 1e-05, as it was written."""
        number = np.frombuffer(self.take(np.dtype(dtype).itemsize, what), dtype)[0]
        return float(str(number)) if dtype == "<f4" else number.item()

    def count(self, what: str, least: int) -> int:
        """How many entries follow, of which each has at least so many bytes. Negative counts read as huge ones."""
        count = self.number("<u8", what)
        if count * least > self.raw.size - self.at:
            raise ValueError(
                f"{self.path}: {what} is {count}, which needs {count * least} bytes or more from byte {self.at}, and "
                f"{self.raw.size - self.at} are left. The file is cut off, or lies about its size."
            )
        return count

    def text(self, what: str) -> str:
        """The next string."""
        length = self.count(f"the length of {what}", 1)
        return self._decoded(self.take(length, what), what)

    def _decoded(self, raw: memoryview, what: str) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} is no UTF-8: {error}.") from None

    def value(self, what: str, kind: int) -> Any:
        """The next value of a kind: a number, a string, or a list of one of these."""
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._values(what)
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path}: {what} has the type {kind}, which is not one of the format's.")
        return self.number(_NUMBERS[kind], what)

    def _values(self, what: str) -> list[Any]:
        kind = self.number("<u4", f"the type of {what}")
        if kind == _STRING:
            return self._texts(self.count(f"the length of {what}", 8), what)
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path}: {what} is a list of the type {kind}, and lists hold numbers or strings.")
        size = np.dtype(_NUMBERS[kind]).itemsize
        count = self.count(f"the length of {what}", size)
        return np.frombuffer(self.take(size * count, what), _NUMBERS[kind]).tolist()

    def _texts(self, count: int, what: str) -> list[str]:
        """A vocabulary has a few hundred thousand of these, so this loop is short."""
        texts, at, view, unpack = [], self.at, self._view, struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + unpack(view, at)[0] if at + 8 <= len(view) else len(view) + 1
            if end > len(view):
                raise ValueError(f"{self.path}: {what} ends past the end of the file.")
            texts.append(self._decoded(view[at + 8 : end], what))
            at = end
        self.at = at
        return texts


def _listed(cursor: _Cursor) -> tuple[str, list[int], int, int]:
    """An entry of the list of tensors: name, shape as the file has it, innermost dimension first, type and offset."""
    name = cursor.text("a name of a tensor")
    what = f"tensor {name!r}"
    dimensions = cursor.number("<u4", f"the dimensions of {what}")
    if not 1 <= dimensions <= 8:
        raise ValueError(f"{cursor.path}: {what} has {dimensions} dimensions; 1 to 8 are read.")
    shape = [cursor.number("<u8", f"the shape of {what}") for _ in range(dimensions)]
    return name, shape, cursor.number("<u4", f"the type of {what}"), cursor.number("<u8", f"the offset of {what}")


def _placed(
    path: pathlib.Path,
    entry: tuple[str, list[int], int, int],
    kinds: dict[int, tuple[str, int, int]],
    start: int,
    alignment: int,
    size: int,
) -> Blocks:
    name, shape, number, offset = entry
    where = f"{path}: tensor {name!r}"
    if number not in kinds:
        raise ValueError(f"{where} has the block type {number}, which the package gguf does not know.")
    if not all(shape):
        raise ValueError(f"{where} has shape {shape[::-1]}, and no extent may be 0.")
    kind, per_block, block_bytes = kinds[number]
    if shape[0] % per_block:
        raise ValueError(f"{where} of {kind} has rows of {shape[0]} numbers, no multiple of its block of {per_block}.")
    row_bytes = shape[0] // per_block * block_bytes
    begin, length = start + offset, row_bytes * math.prod(shape[1:])
    if offset % alignment or begin + length > size:
        raise ValueError(
            f"{where} of {kind} and shape {shape[::-1]} has {length} bytes from byte {begin}, which must be a multiple "
            f"of {alignment} behind {start}, and the file has {size} bytes."
        )
    return Blocks(name, tuple(reversed(shape)), kind, begin, begin + length, row_bytes)


def _require_apart(path: pathlib.Path, blocks: list[Blocks]) -> None:
    if len({one.name for one in blocks}) != len(blocks):
        names = sorted(one.name for one in blocks)
        twice = next(a for a, b in itertools.pairwise(names) if a == b)
        raise ValueError(f"{path}: tensor {twice!r} is listed twice.")
    for before, after in itertools.pairwise(sorted(blocks, key=lambda one: (one.begin, one.end))):
        if after.begin < before.end:
            raise ValueError(
                f"{path}: tensor {after.name!r} begins at byte {after.begin} and overlaps {before.name!r}, which ends "
                f"at {before.end}."
            )
