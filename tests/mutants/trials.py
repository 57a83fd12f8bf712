"""The trials of planted bugs: checks of `paged.testing`, each on a fixed shape. Without a bug every trial passes."""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower import LOWERINGS, DecodeSchedule, RaggedSchedule, Schedule, Sequences
from paged.lower.tpu.write import plan as write_plan
from paged.runtime import PagedAttention, PagePool, Rotary
from paged.spec import ALiBi, Causal, Chunk, PageLayout, PerHead, Prefix, SoftCap, Spans, Tree, Value, Where, Window
from paged.testing import (
    Case,
    Corner,
    check_case,
    check_layer,
    check_lowering,
    check_mask,
    check_pool,
    check_score_op,
    check_write,
    interpret_params,
    interpreted,
)
from paged.testing.specs import BROUGHT, PLAIN, RICH, case_of
from tests.support.listed import Listed

LAYOUT = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
OPEN = PLAIN.replace(causal=False)
_FIRST_FOUND = "paged, the first found"
_UNSHORTENED = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile(_FIRST_FOUND, hypothesis.settings.get_profile("paged"), phases=_UNSHORTENED)
PATIENCE = 20.0  # seconds, after which a kernel of a few pages will never end


def _xla(spec: Any, phase: str, *corners: str, checks: tuple[str, ...] = ("equals the reference",)) -> Callable:
    """The XLA lowering with one page per block and two blocks per step: a few pages are several steps of several."""

    def lower(spec, layout):
        own = paged.lower(spec, layout, "xla").schedule
        own = own.replace(pages_per_block=1, rows_per_tile=4, blocks_per_step=2)
        return paged.lower(spec, layout, "xla", schedule=own)

    return functools.partial(
        check_lowering, lower, specs=[spec], layouts=[LAYOUT], phases=[phase], corners=corners, checks=checks
    )


def _at_once(spec: Any, phase: str, *corners: str, checks: tuple[str, ...] = ("equals the reference",)) -> Callable:
    """The XLA lowering in its form for GPUs, in steps of two row blocks and one page."""
    small = paged.XlaSchedule(pages_per_block=1, rows_per_tile=5, row_blocks_at_once=2, form="at_once")
    lower = functools.partial(paged.lower, target="xla", schedule=small)
    return functools.partial(
        check_lowering, lower, specs=[spec], layouts=[LAYOUT], phases=[phase], corners=corners, checks=checks
    )


def _pool() -> None:
    """The first sequence of operations that fails will do: to find the shortest takes most of the time."""
    try:
        hypothesis.settings.load_profile(_FIRST_FOUND)
        check_pool(PagePool, examples=20)
    finally:
        hypothesis.settings.load_profile("paged")


def _layer() -> None:
    layer, state = _made()
    check_layer(layer, state)


@functools.cache
def _made() -> Any:
    make = eqx.nn.make_with_state(PagedAttention)
    return make(PLAIN.replace(window=5), LAYOUT, 12, 32, rotary=Rotary(8), key=jax.random.key(0))


def _kernel(case: Case, schedule: Schedule, mode: str, generation: str = "v4") -> Callable:
    """A TPU kernel equals the reference for one case, interpreted as if on a chip."""

    def run():
        attend = paged.lower(case.spec, case.layout, "tpu", schedule=schedule).on_chip(generation)
        check_case(interpreted(attend, mode), case, patience=PATIENCE)

    return run


def _update() -> None:
    """The decode kernel that writes new rows too; two sequences write into one granule of a page."""

    def lower(spec, layout):
        attend = paged.lower(spec, layout, "tpu", schedule=DecodeSchedule(pages_per_block=2, buffers=3))
        return interpreted(attend.on_chip("v5p"))

    layout = LAYOUT.replace(page_size=8)
    check_lowering(lower, specs=[PLAIN], layouts=[layout], phases=["decode"], checks=["update"], patience=PATIENCE)


def _write(batch: str, mode: str) -> Callable:
    """The writing kernels, with rings of two stages, so that a few granules go round several times."""
    lowering = next(low for low in LOWERINGS if low.target == "tpu").on_chip("v5e")
    lowering = lowering.interpreted(interpret_params(mode))

    def write(k, v, pages, batch):
        seqs = Sequences.of(batch, k.shape[0], pages.layout.page_size)
        return lowering.write(k, v, pages, seqs, batch.query_rows)

    def run():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("_BLOCKS_AHEAD", 1), ("_MOST_IN_BLOCK", 2), ("_MOST_AHEAD", 1)):
                patch.setattr(write_plan, name, value)
            check_write(write, batches=[batch])

    return run


def _decode(pages_per_block: int, buffers: int = 2, **rest: Any) -> DecodeSchedule:
    return DecodeSchedule(pages_per_block=pages_per_block, buffers=buffers, **rest)


def _ragged(pages_per_block: int = 1, buffers: int = 3) -> RaggedSchedule:
    single_rows = DecodeSchedule(pages_per_block=pages_per_block)
    return RaggedSchedule(pages_per_block=pages_per_block, rows_per_tile=16, buffers=buffers, single_rows=single_rows)


def _late(least: int) -> Where:
    """An opaque mask, under which later rows see more of the first keys. So the first pages may be hidden whole."""
    return Where(functools.partial(_is_late, least))


def _is_late(least: int, p: Any, j: Any) -> Any:
    return p + j >= least


_MHA = PLAIN.replace(num_q_heads=2)
# Two strip groups per tile, and two tiles per sequence, of 16 rows and of one.
_TILES = Case(
    spec=_MHA, page_size=128, phase="decode", rows=17,
    corner=Corner(((2, 1), (0, 9), (3, 0), (1, 0), (4, -1)), (17,) * 5),
)  # fmt: skip
_OPEN_TILES = _TILES.replace(spec=_MHA.replace(causal=False))
_LISTED_TILES = _TILES.replace(spec=_MHA.replace(causal=False, mask=Listed()))
# The first page of one sequence is hidden from its rows, and not from the spare rows of its last tile.
_HIDDEN_TILES = _TILES.replace(spec=_MHA.replace(causal=False, mask=_late(640)), seed=3)
_TREE_TILES = _TILES.replace(spec=_MHA.replace(window=Value("n"), mask=Tree()))
_MASKED_FIRST = case_of("plain", "decode", page_size=8, corner="first page masked")
_OPEN_DECODE = Case(spec=OPEN, page_size=8, phase="decode")
_HIDDEN_DECODE = _OPEN_DECODE.replace(spec=OPEN.replace(mask=_late(48)))
_LISTED_DECODE = _OPEN_DECODE.replace(spec=OPEN.replace(mask=Listed()))
# Masked blocks at both ends of a window, and blocks between that are seen in full.
_WINDOW_DECODE = _OPEN_DECODE.replace(
    spec=PLAIN.replace(window=44),
    pages_per_seq=10,
    corner=Corner(((10, 0), (10, -3), (9, 1), (7, 4), (0, 0)), (1,) * 5),
)
# The first of the step's own tokens is the last one of a page.
_TREE_DECODE = _WINDOW_DECODE.replace(
    spec=PLAIN.replace(mask=Tree()), rows=4, corner=Corner(((9, 3), (4, 3), (0, 2), (10, 0), (0, 0)), (4,) * 5)
)
_BY_HEAD_DECODE = _WINDOW_DECODE.replace(spec=PLAIN.replace(mask=PerHead((Window(44), Causal()))))


_SLOPES = (0.5, -0.25, 2.0, 0.125, 1.0, -3.0)

# Without a causal mask the length is all that hides what lies past it.
TRIALS: dict[str, Callable[[], Any]] = {
    "Causal()": functools.partial(check_mask, Causal(), rule=lambda p, j: j <= p),
    "Window(4)": functools.partial(check_mask, Window(4), rule=lambda p, j: p - j < 4),
    "Prefix(3)": functools.partial(check_mask, Prefix(3), rule=lambda p, j: j < 3),
    "Chunk(5)": functools.partial(check_mask, Chunk(5), rule=lambda p, j: j // 5 == p // 5),
    "~Window(4)": functools.partial(check_mask, ~Window(4), rule=lambda p, j: p - j >= 4),
    "Causal() & (Window(4) | Prefix(3))": functools.partial(
        check_mask, Causal() & (Window(4) | Prefix(3)), rule=lambda p, j: j <= p and (p - j < 4 or j < 3)
    ),
    "Window(n)": functools.partial(
        check_mask, Window(Value("n")), rule=lambda p, j, given: p - j < given.numbers["n"]
    ),
    "Spans(a, b)": functools.partial(check_mask, Spans(Value("a", 2), Value("b", 2))),
    "PerHead((Window(2), Causal()))": functools.partial(check_mask, PerHead((Window(2), Causal()))),
    "SoftCap(5)": functools.partial(
        check_score_op, SoftCap(5.0), formula=lambda s, p, j, h: 5 * math.tanh(s / 5)
    ),
    "ALiBi(slopes)": functools.partial(
        check_score_op, ALiBi(_SLOPES), formula=lambda s, p, j, h: s + _SLOPES[h] * (j - p)
    ),
    "xla, decode": _xla(RICH, "decode", "mixed", "first page masked", "few live"),
    "xla, decode, past the table": _xla(RICH, "decode", checks=("past the table",)),
    "xla, decode, no mask": _xla(OPEN, "decode", "one past a page"),
    "xla, ragged": _xla(RICH, "ragged", "mixed", "more rows than tokens", "first page masked", "few live"),
    "xla, values": _xla(BROUGHT["values"], "ragged", "mixed", "exact pages", "first page masked"),
    "xla, by head": _xla(BROUGHT["by head"], "ragged", "mixed"),
    "xla, tree": _xla(BROUGHT["tree"], "ragged", "mixed", "one past a page"),
    "xla, split and merge": _xla(PLAIN, "decode", checks=("split and merge",)),
    "xla at once, decode": _at_once(RICH, "decode", "mixed", "first page masked", "few live"),
    "xla at once, holes": _at_once(PLAIN, "decode", checks=("holes are invisible",)),
    "xla, write": functools.partial(check_write, paged.write),
    "pool": _pool,
    "pool, the shortest": functools.partial(check_pool, PagePool, examples=20),
    "layer": _layer,
    "decode, late": _kernel(_OPEN_DECODE, _decode(2, 3), "on_wait"),
    "decode, listed": _kernel(_LISTED_DECODE, _decode(2, 3), "on_wait"),
    "decode, hidden pages": _kernel(_HIDDEN_DECODE, _decode(2, 3), "on_wait"),
    "decode, window": _kernel(_WINDOW_DECODE, _decode(2, 3), "on_wait"),
    "decode, apart": _kernel(_OPEN_DECODE.replace(spec=OPEN.replace(num_q_heads=6)), _decode(2, 3), "on_wait"),
    "decode, tree": _kernel(_TREE_DECODE, _decode(1, 3), "on_wait"),
    "decode, by head": _kernel(_BY_HEAD_DECODE, _decode(2, 3), "on_wait"),
    "decode, early": _kernel(_MASKED_FIRST, _decode(1), "eager"),
    "decode, late, one page per block": _kernel(_MASKED_FIRST, _decode(1, 3), "on_wait"),
    "decode, split": _kernel(
        _OPEN_DECODE.replace(dtype="int8", scales="head", corner="exact pages"),
        _decode(1, kv_splits=2, sequence="grid"), "eager",
    ),
    "decode, split, listed": _kernel(
        _LISTED_DECODE.replace(corner="exact pages"), _decode(1, kv_splits=2, sequence="grid"), "eager"
    ),
    "decode, together": _kernel(_OPEN_DECODE.replace(corner="one token"), _decode(4, 4), "on_wait"),
    "decode, together, one empty": _kernel(_OPEN_DECODE, _decode(4, 4), "on_wait"),
    "decode, update": _update,
    "prefill, late": _kernel(_OPEN_TILES, _ragged(), "on_wait"),
    "prefill, listed": _kernel(_LISTED_TILES, _ragged(), "on_wait"),
    "prefill, hidden pages": _kernel(_HIDDEN_TILES, _ragged(), "on_wait"),
    "prefill, early": _kernel(_TILES, _ragged(), "eager"),
    "prefill, half blocks": _kernel(_OPEN_TILES.replace(page_size=64), _ragged(2), "on_wait"),
    "prefill, tree": _kernel(_TREE_TILES, _ragged(), "on_wait"),
    "prefill, interleaved": _kernel(_TILES.replace(order="interleaved"), _ragged(), "on_wait"),
    "prefill, mixed": _kernel(_TILES.replace(page_size=64, phase="ragged", corner="mixed"), _ragged(2, 2), "on_wait"),
    "write": _write("mixed", "on_wait"),
    "write, neighbours": _write("neighbours", "eager"),
}  # fmt: skip
