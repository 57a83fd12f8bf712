"""Weights of experts that are stored as MXFP4 blocks, as the tensors that they stand for."""

import jax.numpy as jnp
import numpy as np

from .config import Config
from .files import Tensor, Weights, unpack_mxfp4


def unpacked(config: Config, weights: Weights) -> Weights:
    """The weights with each pair of MXFP4 blocks and scales as one tensor of bfloat16, unpacked where it is read."""
    if config.experts is None:
        return weights
    tensors = []
    for name, tensor in weights.items():
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in weights:
            tensors.append(_unpacked(tensor, weights[f"{name.removesuffix('_blocks')}_scales"]))
        elif not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in weights):
            tensors.append(tensor)
    return Weights(tensors, weights.metadata)


def _unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, outputs, blocks, 16] as [experts, 32 * blocks, outputs], the order of float checkpoints."""
    if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, 16):
        raise ValueError(
            f"{blocks.file}: tensor {blocks.name!r} must be [experts, outputs, blocks, 16], and {scales.name!r} "
            f"[experts, outputs, blocks]; got {blocks.shape} and {scales.shape}."
        )
    experts, outputs, count, _ = blocks.shape

    def load(index: tuple[slice, ...]) -> np.ndarray:
        some = index[:1]
        parts = unpack_mxfp4(blocks.read(some), scales.read(some), jnp.bfloat16)
        return np.swapaxes(parts, 1, 2)[(slice(None), *index[1:])]

    shape = experts, 32 * count, outputs
    return Tensor(blocks.name.removesuffix("_blocks"), shape, jnp.dtype(jnp.bfloat16), blocks.file, load)
