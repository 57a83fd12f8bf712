"""`lower` with a mesh: what it refuses, which specs it derives, and what `explain` says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import paged
from paged.spec import PAGE_ORDERS, RaggedBatch
from tests.support.specs import PLAIN

from .placing import mesh_of, needs_devices

pytestmark = needs_devices
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
TABLE = [[3, 1], [2, 0]]
BATCH = RaggedBatch.decode([5, 3], TABLE)
Q, KV = jnp.ones((2, 4, 8)), jnp.ones((2, 2, 8))
ALL = {"sequences": 2, "kv_heads": 2, "context": 2}


def _lower(sizes, axes=None, spec=PLAIN, **options):
    mesh, own = mesh_of(sizes)
    return paged.lower(spec, LAYOUT, mesh=mesh, axes=own if axes is None else axes, **options)


def _by_specs(**given):
    mesh, _ = mesh_of(ALL)
    return paged.lower(PLAIN, LAYOUT, mesh=mesh, **given)


def _call(sizes, q=Q, pages=8, batch=BATCH, **options):
    attend = _lower(sizes, **options)
    return attend(q, attend.layout.init(pages), batch)


ERRORS = {
    "no mesh": (lambda: paged.lower(PLAIN, LAYOUT, axes=paged.Axes("model")), ValueError, "they need mesh="),
    "not a mesh": (lambda: paged.lower(PLAIN, LAYOUT, mesh=8, axes=paged.Axes("model")), TypeError, "mesh must be.*8"),
    "not axes": (lambda: _lower({"kv_heads": 2}, "model"), TypeError, r"axes must be paged\.Axes.*got 'model'"),
    "name": (lambda: _lower({"kv_heads": 2}, paged.Axes("modle")), ValueError, r"names 'modle'.*it has \('model',\)"),
    "no name": (lambda: paged.Axes(kv_heads=3), TypeError, "kv_heads must be a mesh axis's name.*got 3"),
    "twice": (lambda: paged.Axes("model", context=("data", "model")), ValueError, "'model' is given more than once"),
    "8 devices": (lambda: _lower({"kv_heads": 8}), ValueError, "8 devices cannot share 4 query heads over 2 KV heads"),
    "3 devices": (lambda: _lower({"kv_heads": 3}), ValueError, "3 devices cannot share .* multiple"),
    "pages": (lambda: _call({"context": 4}, pages=6), ValueError, "6 pages, which 4 devices cannot share evenly"),
    "plain batch": (lambda: _call({"sequences": 2}), ValueError, r"RaggedBatch\.stack of 2 batches.*shape \(2,\)"),
    "stacked batch": (
        lambda: _call({"context": 2}, batch=RaggedBatch.stack([BATCH, BATCH])),
        ValueError,
        "batch must be a plain RaggedBatch",
    ),
    "shards": (
        lambda: _call({"sequences": 4}, batch=RaggedBatch.stack([BATCH, BATCH])),
        ValueError,
        r"stack of 4 batches.*got lengths of shape \(2, 2\)",
    ),
    "rows": (
        lambda: _call({"sequences": 2}, batch=RaggedBatch.stack([BATCH, BATCH])),
        ValueError,
        "q must have 2 rows, 1 for each of the batch's 2 slots; got 1",
    ),
    "odd rows": (
        lambda: _call({"sequences": 2}, q=jnp.ones((3, 4, 8)), batch=RaggedBatch.stack([BATCH, BATCH])),
        ValueError,
        "q has 3 rows, which 2 shards",
    ),
    "stacked for one": (
        lambda: paged.lower(PLAIN, LAYOUT)(Q, LAYOUT.init(8), RaggedBatch.stack([BATCH, BATCH])),
        ValueError,
        "batch must be of one shard",
    ),
    "unlike batches": (
        lambda: RaggedBatch.stack([BATCH, RaggedBatch.decode([1], [[0]])]),
        ValueError,
        r"one shape .*\(2, 2\), \(1, 1\)",
    ),
    "own pages": (
        lambda: _by_specs(in_specs={"q": P("data", "model"), "pages": P("pages", None, "model")}),
        ValueError,
        r"must begin with \('data',\)",
    ),
    "no pages": (lambda: _by_specs(in_specs={"q": P()}), ValueError, 'in_specs must have "q".*"pages"'),
    "unlike specs": (
        lambda: _lower({"kv_heads": 2}, in_specs={"pages": P("model")}),
        ValueError,
        r"in_specs\[\"pages\"\] must be .*model.*follows from the axes; got",
    ),
    "unlike output": (
        lambda: _lower({"context": 2}, out_specs=P("pages")),
        ValueError,
        "out_specs must be .*follows from the axes",
    ),
    "spec of what": (lambda: _lower({"context": 2}, in_specs={"tables": P()}), ValueError, r"got \['tables'\]"),
    "no spec": (lambda: _lower({"context": 2}, in_specs=[P()]), TypeError, "in_specs must give names a PartitionSpec"),
    "value": (
        lambda: _call({"context": 2}, batch=RaggedBatch.decode([5, 3], [[3, 8], [2, 0]]), check=True),
        ValueError,
        r"block_tables\[0, 1\] = 8 .*must be in \[0, 8\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_is_wrong_and_what_would_be_right(name):
    act, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        act()


@pytest.mark.parametrize("scales", [None, "tensor", "head", "token"])
@pytest.mark.parametrize("order", PAGE_ORDERS)
def test_specs_cut_heads_and_pages_of_every_array(order, scales):
    """Each of 2 x 2 x 2 devices has a quarter of the pages and half of the heads."""
    dtype = jnp.float32 if scales is None else jnp.int8
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=dtype, order=order, scales=scales)
    mesh, axes = mesh_of(ALL)
    attend = paged.lower(PLAIN, layout, mesh=mesh, axes=axes)
    given = {"k_scale": 1.0, "v_scale": 1.0} if scales in ("tensor", "head") else {}
    pages, at = layout.init(16, **given), attend.shardings.pages
    own = paged.PageLayout(page_size=4, num_kv_heads=1, head_dim=8, dtype=dtype, order=order, scales=scales)
    shapes = [
        sharding.shard_shape(x.shape) for x, sharding in zip(jax.tree.leaves(pages), jax.tree.leaves(at), strict=True)
    ]
    assert shapes == [x.shape for x in jax.tree.leaves(own.init(4, **given))]


def test_axes_follow_from_specs():
    mesh, axes = mesh_of(ALL)
    given = {"q": P("data", "model"), "pages": P(("data", "pages"), None, "model"), "k": P("data", "model", None)}
    attend = paged.lower(PLAIN, LAYOUT, mesh=mesh, in_specs=given, out_specs=P("data", "model"))
    assert attend == paged.lower(PLAIN, LAYOUT, mesh=mesh, axes=axes)
    assert hash(attend) == hash(paged.lower(PLAIN, LAYOUT, mesh=mesh, axes=axes))
    assert attend.specs.batch == P("data") and attend.specs.lse == P("data", "model")


def test_explanations_count_the_pages_of_all_devices():
    attend = _lower(ALL)
    one, other = RaggedBatch.decode([5, 3], TABLE), RaggedBatch.decode([8, 0], TABLE)
    said = attend.explain(jnp.ones((4, 4, 8)), attend.layout.init(16), RaggedBatch.stack([one, other]))
    assert (said.pages_visited, said.pages_held) == (3 + 2, 3 + 2)
    text = str(said)
    assert "4 query heads over 2 KV heads" in text and "heads are shared by 2 devices: 2 query and 1 KV" in text
    assert "each with its own pages" in text and "one collective gathers states, [tokens, 2, 9] float32" in text
    assert "visits" not in str(attend.explain()) and "each KV head on 2" in str(_lower({"kv_heads": 4}).explain())


def test_values_are_checked_when_traced():
    """`check` reports a fault of the second shard, and marks a sound batch."""
    attend = _lower({"sequences": 2}, check=True)
    q, pages = jnp.ones((4, 4, 8)), attend.layout.init(16)
    sound = RaggedBatch.decode([5, 3], TABLE)
    run = jax.jit(attend.__call__)
    assert np.isfinite(run(q, pages, RaggedBatch.stack([sound, sound]))).all()
    with pytest.raises(Exception, match=r"block_tables\[1, 0\] = 8 "):
        jax.block_until_ready(run(q, pages, RaggedBatch.stack([sound, RaggedBatch.decode([5, 3], [[3, 1], [8, 0]])])))
