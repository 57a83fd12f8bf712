"""`check_lowering`, `check_layer` and the assertions on pages name what is wrong with an attention over pages."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import paged
from paged.runtime import PagedAttention, Rotary
from paged.spec import AttentionSpec, AttentionState, PageLayout, RaggedBatch
from paged.testing import (
    CheckFailure,
    across_targets,
    assert_no_leak,
    assert_pages_visited,
    check_layer,
    check_lowering,
    poison,
    shuffle_pages,
)

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
LAYOUT = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
XLA = {"xla", "xla at once"}


def lower_with(fault):
    """The XLA lowering, with a fault in what it is given or gives."""

    def lower(spec, layout):
        attend = paged.lower(spec, layout, "xla")
        return lambda q, pages, batch: fault(attend, q, pages, batch)

    return lower


def _changed(batch, **changes):
    values = {name: getattr(batch, name) for name in ("lengths", "block_tables", "query_starts", "num_seqs")}
    return RaggedBatch(**{**values, **changes}, query_rows=batch.query_rows)


def _length_off_by_one(attend, q, pages, batch):
    return attend(q, pages, _changed(batch, lengths=jnp.maximum(batch.lengths - 1, 0)))


def _dead_slots_live(attend, q, pages, batch):
    return attend(q, pages, _changed(batch, num_seqs=batch.num_slots))


def _neighbours_leak(attend, q, pages, batch):
    out = attend(q, pages, batch)
    return out + 1e-7 * jnp.where(out == 0, 0, jnp.nan_to_num(out).sum())


def _page_numbers_leak(attend, q, pages, batch):
    out = attend(q, pages, batch)
    return jnp.where(out == 0, 0, out * (1 + 1.2e-7 * (batch.block_tables[0, :2].sum() % 5).astype(jnp.float32)))


def _zero_times_nan(attend, q, pages, batch):
    return attend(q, pages, batch) + 0 * pages.arrays[0].sum()


def _base_two(attend, q, pages, batch):
    state = attend.state(q, pages, batch)
    return AttentionState(state.out, state.lse / jnp.log(jnp.float32(2)))


FAULTS = {
    "length off by one": (_length_off_by_one, "equals the reference: .*error .*allowed .*with the corner 'mixed'"),
    "dead slots live": (_dead_slots_live, "equals the reference: .*with the corner"),
    "neighbours leak": (_neighbours_leak, "other sequences are invisible: another sequence changed a result"),
    "page numbers leak": (_page_numbers_leak, "page order is invisible: the order of pages"),
    "0 * NaN": (_zero_times_nan, "equals the reference: not finite at"),
    "lse in base two": (_base_two, "equals the reference: lse"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name):
    fault, text = FAULTS[name]
    with pytest.raises(CheckFailure, match=f"(?s){text}"):
        check_lowering(lower_with(fault), specs=[SPEC], phases=["decode"], corners=["mixed", "few live"])


def test_refusals_are_told_and_all_refused_is_an_error():
    def lower(spec, layout):
        raise ValueError("never")

    with pytest.raises(ValueError, match="Nothing was checked: never"):
        check_lowering(lower, specs=[SPEC])


def test_layers_whose_positions_come_from_the_step_are_named():
    layer, state = eqx.nn.make_with_state(PagedAttention)(SPEC, LAYOUT, 16, 16, rotary=Rotary(8), key=jax.random.key(0))
    check_layer(layer, state)

    class StepPositions(PagedAttention):
        def __call__(self, x, batch, state):
            pages = state.get(self.cache.index)
            projections = (self.query_proj, self.key_proj, self.value_proj)
            q, k, v = (jax.vmap(proj)(x).reshape(len(x), -1, self.spec.head_dim) for proj in projections)
            rows = jnp.arange(len(x), dtype=jnp.int32)  # the rows of the step, not positions
            q, k = self.rotary(q, rows), self.rotary(k, rows)
            out, pages = self.cache.attend_pages(q, k, v, pages, batch)
            return jax.vmap(self.output_proj)(out.reshape(len(x), -1)), state.set(self.cache.index, pages)

    wrong, state = eqx.nn.make_with_state(StepPositions)(SPEC, LAYOUT, 16, 16, rotary=Rotary(8), key=jax.random.key(0))
    with pytest.raises(CheckFailure, match=r'served equals dense: in the plan "chunks.*token 8 of sequence 0'):
        check_layer(wrong, state)


def test_assertions_on_pages():
    batch = RaggedBatch.decode(lengths=[5, 2], block_tables=[[3, 1], [0, -1]])
    pages = poison(LAYOUT.init(6), batch)
    moved, other = shuffle_pages(pages, batch, seed=3)
    attend, q = paged.lower(SPEC, LAYOUT, "xla"), jax.random.normal(jax.random.key(0), (2, 4, 8))
    assert (attend(q, pages, batch) == attend(q, moved, other)).all()
    assert_pages_visited(attend, pages, batch, rows=2, expected=3)
    with pytest.raises(CheckFailure, match="visits 3 pages, and 2 were expected"):
        assert_pages_visited(attend, pages, batch, rows=2, expected=2)
    leaked = LAYOUT.wrap(pages.arrays[0].at[2].set(1.0))
    with pytest.raises(CheckFailure, match=r"\(page, offset\) \[\(2, 0\), \(2, 1\)"):
        assert_no_leak(pages, leaked, batch)


def test_across_targets_has_every_lowering_that_accepts():
    wide = PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    assert set(across_targets(SPEC, wide)) == {*XLA, "tpu-decode inline", "tpu-decode grid", "tpu-ragged"}
    assert set(across_targets(SPEC, LAYOUT)) == XLA
    pairs = LAYOUT.replace(order="interleaved")
    assert set(across_targets(SPEC, pairs)) == {*XLA, "ragged_page_attention_v2", "ragged_page_attention_v3"}
    mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
    assert len(across_targets(SPEC, LAYOUT, mesh, paged.Axes(kv_heads="model"))) == 3
