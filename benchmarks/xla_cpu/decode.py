"""Decode: one query row per sequence, as a share of READ, the speed of summing the bytes that the batch needs."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import paged

from . import peers
from .inputs import HEAD_DIM, KV_HEADS, Inputs, decode_inputs, even, layout, spec, uneven
from .measure import Candidate, Row, Setting, compiled, interleaved, progress, read


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the decode table."""

    dtype: str
    batch: int
    context: int
    page_size: int = 16
    lengths: str = "even"
    order: Any = "packed"
    has_peers: bool = False

    def __str__(self) -> str:
        order = "" if self.order == "packed" else f", {self.order}"
        return f"{self.dtype}, {self.batch} x {self.context}, page {self.page_size}, {self.lengths}{order}"


def cases(setting: Setting) -> list[Case]:
    """Every dtype, batch, context, page size and kind of lengths; orders and int8 at one point each.

    On all cores without most of the larger pages, which only repeat what one core says of them.
    """
    if setting.is_quick:
        points = [Case(dtype, 8, context) for dtype in ("float32", "bfloat16") for context in (1024, 4096)]
        return [*points, Case("float32", 8, 4096, lengths="uneven"), Case("int8", 8, 4096)]
    points = [
        Case(dtype, batch, context, page_size, lengths)
        for dtype in ("float32", "bfloat16")
        for batch in (8, 32)
        for context in (1024, 4096, 16384)
        for page_size in (16, 64)
        for lengths in ("even", "uneven")
        if setting.cores == "one" or page_size == 16 or (batch, context, lengths) == (8, 4096, "even")
    ]
    dtypes, orders = ("float32", "bfloat16"), ("split", "interleaved")
    others = [Case(dtype, 8, 4096, order=order) for dtype in dtypes for order in orders]
    with_peers = [
        dataclasses.replace(point, has_peers=True)
        for point in points
        if (point.batch, point.context, point.page_size) == (8, 4096, 16)
    ]
    points = [point for point in points if dataclasses.replace(point, has_peers=True) not in with_peers]
    return [*with_peers, *points, *others, Case("int8", 8, 4096)]


def run(setting: Setting) -> Iterator[Row]:
    """The decode table's rows."""
    for case in progress("decode", setting, cases(setting)):
        lengths = (even if case.lengths == "even" else uneven)(case.batch, case.context)
        inputs = decode_inputs(layout(case.dtype, case.page_size, case.order), lengths)
        yield from _rows(str(case), case, inputs, setting)


def _rows(label: str, case: Case, inputs: Inputs, setting: Setting) -> Iterator[Row]:
    attend = paged.lower(spec(), inputs.pages.layout, target="xla")
    candidates = {
        "READ": read((inputs.tokens, 2 * KV_HEADS * HEAD_DIM), inputs.pages.layout.dtype),
        "paged": compiled(attend, inputs.q, inputs.pages, inputs.batch),
        "paged, one device per core": _on_every_core(inputs),
    }
    expected = candidates["paged"].call()
    absent = {}
    if case.has_peers:
        found = {"gather all + dense softmax": functools.partial(_gather_all_candidate, inputs), **peers.decode(inputs)}
        others, absent = peers.accept(found, expected)
        candidates |= others
    samples = interleaved(candidates, setting)
    for name, candidate in candidates.items():
        yield Row(
            "decode",
            label,
            name,
            setting.cores,
            samples.median(name),
            samples.ratio("READ", name),
            candidate.temporaries,
            candidate.compile_seconds,
            samples.others,
        )
    for name, reason in absent.items():
        yield Row("decode", label, name, setting.cores, note=reason)


def _on_every_core(inputs: Inputs) -> Candidate:
    """KV heads shared by this process's CPU devices, of which the parent has made one per core."""
    mesh = jax.make_mesh((jax.device_count(),), ("cores",))
    attend = paged.lower(spec(), inputs.pages.layout, target="xla", mesh=mesh, axes=paged.Axes(kv_heads="cores"))
    lie = attend.shardings
    return compiled(attend, *jax.device_put((inputs.q, inputs.pages, inputs.batch), (lie.q, lie.pages, lie.batch)))


def _gather_all_candidate(inputs: Inputs) -> Candidate:
    return compiled(gather_all, inputs.q, inputs.pages.arrays[0], inputs.batch.block_tables, inputs.batch.lengths)


def gather_all(q: jax.Array, kv: jax.Array, tables: jax.Array, lengths: jax.Array) -> jax.Array:
    """What a reference does: gather every page of the table into a dense array, then a softmax over its full width."""
    seqs, width = tables.shape
    pages = kv[jnp.maximum(tables, 0)].astype(jnp.float32)  # [seqs, width, 2, heads, page_size, dim]
    k, v = (jnp.moveaxis(pages[:, :, which], 2, 1).reshape(seqs, KV_HEADS, -1, HEAD_DIM) for which in (0, 1))
    grouped = q.astype(jnp.float32).reshape(seqs, KV_HEADS, -1, HEAD_DIM)
    s = jnp.einsum("shgd,shjd->shgj", grouped, k) * HEAD_DIM**-0.5
    is_visible = jnp.arange(width * kv.shape[3]) < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(is_visible[:, None, None], s, -jnp.inf), axis=-1)
    return jnp.einsum("shgj,shjd->shgd", weights, v).reshape(q.shape).astype(q.dtype)
