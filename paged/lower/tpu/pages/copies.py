"""What XLA copies of the pages at every call, because kernels cannot read it as XLA lays it out; and what avoids that.

XLA lays out an array whose last axis is no multiple of 128 lanes with another axis along the lanes. A kernel copies
whole lanes, so XLA first copies the array into lanes that are padded, and after a write back (seen in compiled code).
"""

import math

from paged.spec import PageLayout

from ..chips import LANES
from .transfer import Pool, pools_of


def copies_of_pages(layout: PageLayout, num_pages: int, scale: float) -> list[str]:
    """A line for the arrays of keys and values that XLA copies, and one for per-token scales that it copies.

    ``scale`` is that of the scores, which a padded ``head_dim`` must not change.
    """
    pools = [pool for pool in pools_of(layout) if pool.page_shape[-1] % LANES]
    stored, scales = ([pool for pool in pools if pool.is_scale == is_scale] for is_scale in (False, True))
    lines = []
    if stored:
        lines.append(_line(_name(layout), stored, num_pages, _dims(layout), _advice(layout, scale)))
    if scales:
        advice = f"pages of a multiple of {LANES} tokens, or a scale per head or tensor, need no copy"
        lines.append(_line("the per-token scales", scales, num_pages, f"page_size {layout.page_size}", advice))
    return lines


def _line(what: str, pools: list[Pool], num_pages: int, dims: str, advice: str) -> str:
    mebibytes = num_pages * sum(_padded_bytes(pool) for pool in pools) / 2**20
    verb = "is" if dims.count(" ") == 1 else "are"
    return (
        f"XLA copies {what} at every call and every write, {mebibytes:.1f} MiB: {dims} {verb} no multiple of {LANES} "
        f"lanes; {advice}"
    )


def _padded_bytes(pool: Pool) -> int:
    *shape, lanes = pool.page_shape
    return math.prod(shape) * _round_up(lanes) * pool.dtype.itemsize


def _name(layout: PageLayout) -> str:
    if layout.order != "split" or (layout.head_dim % LANES and layout.value_dim % LANES):
        return "the pool"
    return "the pool's keys" if layout.head_dim % LANES else "the pool's values"


def _dims(layout: PageLayout) -> str:
    dims = {"head_dim": layout.head_dim, "value_dim": layout.value_dim}
    if layout.head_dim == layout.value_dim:
        del dims["value_dim"]
    return " and ".join(f"{name} {dim}" for name, dim in dims.items() if dim % LANES)


def _advice(layout: PageLayout, scale: float) -> str:
    """Joined order where it accepts the dimensions, and whole lanes of zeros elsewhere."""
    if layout.head_dim == layout.value_dim:
        return 'order="joined" lies in whole lanes and needs no copy'
    padded = []
    if layout.head_dim % LANES:
        dim = _round_up(layout.head_dim)
        padded.append(f"queries and keys with zeros to head_dim={dim} and give the spec scale={scale!r}")
    if layout.value_dim % LANES:
        dim = _round_up(layout.value_dim)
        padded.append(f"values with zeros to value_dim={dim} and cut the output to {layout.value_dim}")
    return f"to need no copy, pad {' and '.join(padded)}"


def _round_up(lanes: int) -> int:
    return -(-lanes // LANES) * LANES
