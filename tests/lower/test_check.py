"""`check`: every fault of the caller is named with its array, sequence and value, eagerly and under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import AttentionSpec, RaggedBatch

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
TOKENS, PAGES = 8, 9
# Three sequences of 5, 9 and 4 tokens with 2, 3 and 1 rows; the fourth slot is dead and holds garbage.
GOOD = {
    "lengths": [5, 9, 4, -3],
    "block_tables": [[0, 1, -1], [2, 3, 4], [5, 99, -7], [-1, 77, 0]],
    "query_starts": [0, 2, 5, 6, -9],
    "num_seqs": 3,
    "copy_from": [8, -1, 7, 99],
}
# What is put where, and the error.
FAULTS = {
    "num_seqs over": ("num_seqs", (), 5, r"num_seqs = 5 is out of range.*must be in \[0, 4\]"),
    "num_seqs under": ("num_seqs", (), -1, r"num_seqs = -1 is out of range"),
    "first start": ("query_starts", 0, 1, r"query_starts\[0\] = 1 \(sequence 0\) must be 0"),
    "decreasing": ("query_starts", 2, 1, r"query_starts\[2\] = 1 \(sequence 1\) decreases: it follows 2"),
    "past the rows": ("query_starts", 3, 9, r"query_starts\[3\] = 9 \(sequence 2\) is past the 8 query rows"),
    "length over": ("lengths", 1, 13, r"lengths\[1\] = 13 \(sequence 1\) is out of range.*hold \[0, 12\]"),
    "length under": ("lengths", 2, -1, r"lengths\[2\] = -1 \(sequence 2\) is out of range"),
    "fewer than rows": ("lengths", 1, 2, r"lengths\[1\] = 2 \(sequence 1\) is less than its 3 query rows"),
    "hole": (
        "block_tables",
        (1, 0),
        -1,
        r"block_tables\[1, 0\] = -1 \(sequence 1\) is no page.*tokens 0 to 3.*\[0, 9\)",
    ),
    "past the pool": ("block_tables", (0, 1), 9, r"block_tables\[0, 1\] = 9 \(sequence 0\) is no page.*tokens 4 to 4"),
    "copied past the pool": ("copy_from", 0, 9, r"copy_from\[0\] = 9 \(sequence 0\) is no page.*\[0, 9\)"),
    "copied and written": ("copy_from", 0, 4, r"copy_from\[0\] = 4 \(sequence 0\) is written by sequence 1"),
    "one slot twice": ("block_tables", (2, 0), 0, r"block_tables\[2, 0\] = 0 \(sequence 2\) .*slot 3.*by sequence 0"),
}


def _batch(**changes):
    """The values as arrays: what is at fault in them is known only when a call runs."""
    values = changes.pop("values", None)
    return RaggedBatch(**{name: jnp.asarray(value) for name, value in {**GOOD, **changes}.items()}, values=values)


def _faulty(name):
    array, where, value, text = FAULTS[name]
    values = np.array(GOOD[array])
    values[where] = value
    return _batch(**{array: values}), text


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(0, 3, (TOKENS, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    pages = LAYOUT.wrap(jnp.asarray(rng.normal(0, 3, (PAGES, 2, 2, 4, 8)), jnp.float32))
    return q, k, v, pages


@pytest.fixture(scope="module")
def checked_jit():
    attend = paged.lower(SPEC, LAYOUT, check=True)
    return jax.jit(attend.__call__), jax.jit(attend.update)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_eagerly(name, arrays):
    batch, text = _faulty(name)
    q, k, v, pages = arrays
    attend = paged.lower(SPEC, LAYOUT, check=True)
    for act in (
        lambda: paged.check(SPEC, pages, batch, TOKENS),
        lambda: attend(q, pages, batch),
        lambda: attend.update(q, k, v, pages, batch),
    ):
        with pytest.raises(ValueError, match=text):
            act()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_under_jit(name, arrays, checked_jit):
    batch, text = _faulty(name)
    q, k, v, pages = arrays
    for act in (lambda: checked_jit[0](q, pages, batch), lambda: checked_jit[1](q, k, v, pages, batch)):
        with pytest.raises(jax.errors.JaxRuntimeError, match=text):
            jax.block_until_ready(act())


def test_a_sound_batch_passes_and_changes_nothing(arrays, checked_jit):
    """With garbage in the dead slot, and in entries that no token needs."""
    q, k, v, pages = arrays
    plain, checked = paged.lower(SPEC, LAYOUT), paged.lower(SPEC, LAYOUT, check=True)
    want = plain(q, pages, _batch())
    np.testing.assert_array_equal(checked(q, pages, _batch()), want)
    np.testing.assert_allclose(checked_jit[0](q, pages, _batch()), want, rtol=0, atol=1e-6)
    assert np.abs(np.asarray(checked.update(q, k, v, pages, _batch())[0])).max() > 1


def test_a_decode_step_of_an_empty_slot_is_no_fault(arrays):
    """Length 0 with a row is how a decode batch of fixed width holds a free slot."""
    q, _, _, pages = arrays
    batch = RaggedBatch.decode([3, 0], [[1], [-1]])
    assert not np.asarray(paged.lower(SPEC, LAYOUT, check=True)(q[:2], pages, batch)[1]).any()


def test_pages_that_the_mask_hides_need_no_page(arrays):
    """With a window the first page of a long sequence may be gone; without, it is a fault."""
    pages = arrays[3]
    batch = RaggedBatch.decode([12], [[-1, -1, 3]])
    paged.check(SPEC.replace(window=4), pages, batch, 1)
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] = -1"):
        paged.check(SPEC.replace(window=5), pages, batch, 1)


def test_numbers_that_a_batch_brings_are_checked(arrays):
    """Less than the least is named, but in a dead slot. Pages are needed where the sequence's own number says."""
    pages, spec = arrays[3], SPEC.replace(window=paged.Value("window"))
    paged.check(spec, pages, _batch(values={"window": jnp.array([1, 9, 4, -9])}), TOKENS)
    with pytest.raises(
        ValueError, match=r"values\['window'\]\[1\] = 0 \(sequence 1\) must be at least 1, for .*window"
    ):
        paged.check(spec, pages, _batch(values={"window": jnp.array([1, 0, 4, 1])}), TOKENS)
    gone = dict(lengths=[12], block_tables=[[-1, -1, 3]])
    paged.check(spec, pages, RaggedBatch.decode(**gone, values={"window": [4]}), 1)
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] = -1"):
        paged.check(spec, pages, RaggedBatch.decode(**gone, values={"window": [5]}), 1)
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] = -1"):  # a row that its position puts further back
        paged.check(spec, pages, RaggedBatch.decode(**gone, values={"window": [4]}, positions=[9]), 1)
    far = SPEC.replace(mask=paged.Where(_further, values=(paged.Value("least", dtype="float32"),)))
    paged.check(far, pages, _batch(values={"least": jnp.full(4, 0.5)}), TOKENS)
    for wrong, text in (({}, r"names \['window'\], which the batch must bring"), ({"wide": [1] * 4}, "window")):
        with pytest.raises(ValueError, match=text):
            paged.check(spec, pages, _batch(values=wrong), TOKENS)


def test_numbers_of_scores_are_checked_too(arrays):
    """A batch that is checked for one spec is not for another one whose scores ask more of the same numbers."""
    pages, bound = arrays[3], paged.Value("bound", dtype="float32")
    plain = SPEC.replace(scores=(paged.Bias(_shifted, values=(bound,)),))
    checked = paged.check(plain, pages, _batch(values={"bound": jnp.array([5.0, 0.0, 5.0, -1.0])}), TOKENS)
    for batch in (checked, _batch(values={"bound": jnp.array([5.0, 0.0, 5.0, -1.0])})):
        with pytest.raises(ValueError, match=r"values\['bound'\]\[1\] = 0.0 \(sequence 1\) must be at least.*tanh"):
            paged.check(SPEC.replace(scores=(paged.SoftCap(bound),)), pages, batch, TOKENS)
    paged.check(SPEC.replace(scores=(paged.SoftCap(bound),)), pages, _batch(values={"bound": jnp.ones(4)}), TOKENS)


def _shifted(p, j, h, bound):
    return bound + jnp.zeros_like(j, jnp.float32)


def _further(p, j, least):
    return (p - j).astype(jnp.float32) >= least


def test_a_checked_batch_is_not_checked_again_for_a_spec_that_sees_no_more(arrays):
    """And is for one that sees more. The mark is static, so a model's layers share one check."""
    pages = arrays[3]
    batch = RaggedBatch.decode([12], [[-1, -1, 3]])
    checked = paged.check(SPEC.replace(window=4), pages, batch, 1)
    again = paged.check(SPEC.replace(window=3), pages, checked, 1)
    assert again is checked
    with pytest.raises(ValueError, match=r"block_tables\[0, 0\] = -1"):
        paged.check(SPEC, pages, checked, 1)


def test_a_checked_batch_is_checked_again_for_another_pool(arrays):
    """A smaller pool, or fewer query rows, make faults of what was sound; a larger pool makes none."""
    pages = arrays[3]
    checked = paged.check(SPEC, pages, _batch(), TOKENS)
    assert paged.check(SPEC, LAYOUT.init(pages.num_pages + 1), checked, TOKENS) is checked
    with pytest.raises(ValueError, match=r"block_tables\[1, 1\] = 3 .*\[0, 3\)"):
        paged.check(SPEC, LAYOUT.init(3), checked, TOKENS)
    with pytest.raises(ValueError, match="past the 5 query rows"):
        paged.check(SPEC, pages, checked, 5)


def test_layers_of_one_mask_trace_one_callback(arrays):
    """Two layers over one checked batch: one host callback in the program, and none in an unchecked one."""
    q, _, _, pages = arrays
    attend = paged.lower(SPEC, LAYOUT, check=True)

    def model(q, pages, batch):
        batch = paged.check(SPEC, pages, batch, TOKENS)
        return attend(attend(q, pages, batch), pages, batch)

    assert str(jax.make_jaxpr(model)(q, pages, _batch())).count("pure_callback[") == 1


# Without check: the results that the edges of docs/semantics.md list, and never a crash or another sequence's data.
SILENT = {
    "num_seqs over": ("num_seqs over", _batch(num_seqs=4, lengths=[5, 9, 4, 0], query_starts=[0, 2, 5, 6, 6])),
    "num_seqs under": ("num_seqs under", _batch(num_seqs=0)),
    "decreasing": ("decreasing", None),
    # Keys past the table do not exist: as in a wider table, whose other entries are holes.
    "length over": (
        "length over",
        _batch(lengths=[5, 13, 4, -3], block_tables=[[*row, -1] for row in GOOD["block_tables"]]),
    ),
    "length under": ("length under", _batch(lengths=[5, 9, 0, -3])),
    "fewer than rows": ("fewer than rows", None),
    "hole": ("hole", None),
    "past the pool": ("past the pool", None),
    "one slot twice": ("one slot twice", None),
}


@pytest.mark.parametrize("name", SILENT)
def test_without_check_the_rows_of_the_semantics_hold(name, arrays):
    """Each fault against the reference on the batch that it stands for: clamped, hidden, or as it is."""
    fault, meant = SILENT[name]
    q, _, _, pages = arrays
    batch = _faulty(fault)[0]
    if name == "num_seqs over":
        batch = RaggedBatch(meant.lengths, meant.block_tables, meant.query_starts, jnp.int32(5))
    got = paged.lower(SPEC, LAYOUT)(q, pages, batch)
    want = _reference(SPEC, q, pages, batch if meant is None else meant)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert np.isfinite(np.asarray(got)).all()


_reference = jax.jit(paged.reference, static_argnums=0)


@pytest.mark.parametrize("name", ["first start", "decreasing", "past the rows", "num_seqs over"])
def test_faulty_starts_leave_the_sequences_before_them_alone(name, arrays):
    """And write nothing outside of the pages in the live tables."""
    q, k, v, pages = arrays
    batch = _faulty(name)[0]
    attend = paged.lower(SPEC, LAYOUT)
    out, after = attend.update(q, k, v, pages, batch)
    assert np.isfinite(np.asarray(out)).all()
    used = [0, 1, 2, 3, 4, 5] if name != "num_seqs over" else [0, 1, 2, 3, 4, 5, 77]
    for page in set(range(PAGES)) - set(used):
        np.testing.assert_array_equal(after.arrays[0][page], pages.arrays[0][page])
    if name != "first start":
        clean = attend.update(q, k, v, pages, _batch())[0]
        np.testing.assert_allclose(out[:1], clean[:1], rtol=0, atol=1e-5)
