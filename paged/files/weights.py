"""`Tensor` and `Weights`: what a checkpoint holds, by name, before anything of it is read."""

import collections.abc
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a file. Nothing of it is read before `read`.

    * ``name``: its name in the checkpoint.
    * ``shape``, ``dtype``: of the array that `read` gives. bfloat16 and the small floats are those of ``ml_dtypes``,
      which JAX uses too. Blocks of quantised numbers count as the float32 numbers that they stand for.
    * ``file``: the file that holds it.

    >>> file = pathlib.Path("a.safetensors")
    >>> Tensor("norm.weight", (3,), np.dtype(float), file, lambda index: np.ones(3)[index]).read((slice(0, 2),))
    array([1., 1.])
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    load: Callable[[tuple[slice, ...]], np.ndarray] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole array that `read` gives."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The array, or a part of it. Of a mapped file, only that part is touched.

        **Arguments:**

        * ``index``: a slice for each of the first dimensions, as ``jax.make_array_from_callback`` gives them. Left out:
          everything.

        **Returns:** ``dtype[shape of the part]``. It may be a read-only view of the file: copy it to change it.

        Raises ``TypeError`` if ``index`` is no tuple of slices, and ``ValueError`` if it has too many.
        """
        if not isinstance(index, tuple) or not all(isinstance(part, slice) for part in index):
            raise TypeError(f"index of {self.name} must be a tuple of slices, such as (slice(0, 2),); got {index!r}.")
        if len(index) > len(self.shape):
            raise ValueError(f"index of {self.name} has {len(index)} slices, and its shape is {self.shape}.")
        return self.load(index)


class Weights(collections.abc.Mapping[str, Tensor]):
    """The tensors of a checkpoint, by name, from one or many files.

    * ``metadata``: the text that the files carry beside their tensors.

    >>> Weights([]).metadata
    {}
    """

    def __init__(self, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None):
        self._tensors: dict[str, Tensor] = {}
        for tensor in tensors:
            other = self._tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise ValueError(f"{tensor.file}: tensor {tensor.name!r} is also in {other.file}. Keep one of them.")
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays together."""
        return sum(tensor.nbytes for tensor in self.values())

    def __repr__(self) -> str:
        return f"Weights of {len(self)} tensors, {self.nbytes / 1e6:.1f} MB"
