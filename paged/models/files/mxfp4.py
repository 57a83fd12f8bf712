"""MXFP4: numbers of four bits in blocks of 32 that share a power of two, as gpt-oss stores its experts."""

import ml_dtypes
import numpy as np


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """The numbers that MXFP4 blocks stand for.

    Source: OCP Microscaling Formats specification, version 1.0, sections 5.3 and 6.3.

    **Arguments:**

    * ``blocks``: uint8[..., blocks, 16]. Two numbers of float4_e2m1fn in a byte, the first in the low bits.
    * ``scales``: uint8[..., blocks]. A block's exponent, plus 127; 255 makes its numbers NaN.
    * ``dtype``: of the result. bfloat16 holds every such number but those below its smallest.

    **Returns:** ``dtype[..., 32 * blocks]``.

    Raises ``TypeError`` or ``ValueError`` if dtypes or shapes are others.

    >>> unpack_mxfp4(np.full((1, 16), 0x21, np.uint8), np.array([128], np.uint8))[:4]
    array([1., 2., 1., 2.], dtype=float32)
    """
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
        raise TypeError(f"blocks and scales must be uint8; got {blocks.dtype} and {scales.dtype}.")
    if blocks.shape != (*scales.shape, 16):
        raise ValueError(
            f"blocks must be [..., blocks, 16] and scales [..., blocks]; got {blocks.shape}, {scales.shape}."
        )
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    pairs = values[np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1)]  # both numbers of every byte
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    numbers = pairs[blocks].reshape(*scales.shape, 32) * factors[..., None]
    return numbers.reshape(*scales.shape[:-1], -1).astype(dtype, copy=False)
