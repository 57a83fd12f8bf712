"""`first_rows` and `may_cut` equal the mask evaluated at every pair; `check` with final lengths names row and key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import _ahead, first_rows, may_cut
from paged.spec import AttentionSpec, Causal, Chunk, Everything, Not, Nothing, Prefix, RaggedBatch, Where, Window

MASKS = [
    Causal(),
    Everything(),
    Nothing(),
    Not(Causal()),
    Causal() | Prefix(5),
    Causal() & Window(3),
    Window(3),
    Chunk(4),
    Causal() | (Chunk(4) & ~Prefix(4)),
    Where(lambda p, j: j <= p),  # opaque and causal
    Where(lambda p, j: j <= p + 2),
    Causal() | (Where(lambda p, j: (p == 2) & (j == 9))),
]


@pytest.mark.parametrize("tile", [4, 512])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_cuts_are_where_no_earlier_row_sees_a_later_key(mask, tile, monkeypatch):
    monkeypatch.setattr(_ahead, "_TILE", tile)
    for tokens in (1, 2, 11):
        position = np.arange(tokens)
        seen = np.broadcast_to(np.asarray(mask(position[:, None], position[None])), (tokens, tokens))
        expected = [not seen[:cut, cut:].any() for cut in range(tokens + 1)]
        assert may_cut(first_rows(mask, tokens)).tolist() == expected


LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=1, head_dim=8, dtype=jnp.float32)
SPEC = AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=8, causal=False, mask=Causal() | Prefix(6))


def check(lengths, rows, final_lengths, spec=SPEC):
    starts = np.concatenate([[0], np.cumsum(rows)])
    batch = RaggedBatch(lengths, np.arange(4 * len(lengths)).reshape(-1, 4), starts)
    return paged.check(spec, LAYOUT.init(16), batch, 16, final_lengths=final_lengths)


def test_check_says_where_a_step_may_end():
    for _ in range(2):  # a batch that is marked as checked is asked again
        with pytest.raises(
            ValueError, match=r"lengths\[1\] = 4 \(sequence 1\).*row 0 sees token 4.*end at token 6 of 9"
        ):
            check([3, 4], [3, 4], [3, 9])
    for lengths, rows, final in [([6, 8], [6, 2], [9, 9]), ([4], [4], [4]), ([4], [0], [9])]:
        assert check(lengths, rows, final).checked_for is not None
    check([4], [4], [9], SPEC.replace(causal=True))
    with pytest.raises(ValueError, match=r"final_lengths\[0\] = 3 \(sequence 0\) is less than lengths\[0\] = 4"):
        check([4], [4], [3])
    with pytest.raises(TypeError, match="final_lengths must be int32\\[1\\]; got float64"):
        check([4], [4], [9.0])
    with pytest.raises(TypeError, match="must be concrete, not traced"):
        jax.jit(lambda final: check([4], [4], final))(jnp.array([9]))
