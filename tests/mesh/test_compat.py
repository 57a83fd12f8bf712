"""The field's entry points on a mesh: by axes, and by a spec for each array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import paged
from paged.compat import page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from tests.compat.entries import CLOSE, ENTRIES, RICH, arrays_of, build, built_for, by_loops

from .placing import mesh_of, needs_devices

pytestmark = needs_devices
slow = pytest.mark.slow
HEADS, CACHE = P(None, "model"), P(None, None, "model")
# For two KV heads: the number of devices, and how the call says where its arrays lie.
WAYS = {
    "page": (4, {"axes": paged.Axes(kv_heads="model")}),
    "prefill": (2, {"in_specs": (P(None, "model", None), P("model"), P("model"), P(), P()), "out_specs": HEADS}),
    "v2": (4, {"in_specs": {"query": HEADS, "kv_pages": P()}}),
    "v3": (2, {"in_specs": (HEADS,) * 3 + (CACHE,) + (P(),) * 4, "out_specs": (HEADS, CACHE)}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "page")) for n in ENTRIES])
def test_entry_points_on_a_mesh_compute_the_same(name):
    devices, how = WAYS[name]
    mesh, _ = mesh_of({"kv_heads": devices})
    case = ENTRIES[name].case(RICH, corner="few live")
    args = arrays_of(name, built_for(name, case))
    got = ENTRIES[name].call(*args, mesh=mesh, target="xla", **ENTRIES[name].arguments(RICH), **how)
    out = got[0] if name == "v3" else got
    assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, "model")), 3)
    np.testing.assert_allclose(out, by_loops(name, build(case)), rtol=0, atol=CLOSE)


# How EasyDeL's layers say where arrays lie: a spec for sinks in every call, and axes of one device everywhere.
EASYDEL = {
    "v2": ((P(("dp", "sp"), "model"), P(None, None, "model"), *[P()] * 4, P(None)), P(None, "model")),
    "v3": ((P("dp", "model"),) * 3 + (P("dp", None, "model"), P(None), *[P()] * 3, None), (HEADS, CACHE)),
}


@pytest.mark.parametrize(
    ("name", "sinks"),
    [("v2", True), ("v3", False), *[pytest.param(*x, marks=slow) for x in (("v2", False), ("v3", True))]],
)
def test_specs_as_easydel_gives_them(name, sinks):
    mesh = jax.make_mesh((1, 2, 1), ("dp", "model", "sp"), devices=jax.devices()[:2])
    case = ENTRIES[name].case(RICH.replace(sinks=sinks), corner="few live")
    in_specs, out_specs = EASYDEL[name]
    how = {"mesh": mesh, "in_specs": in_specs, "out_specs": out_specs, "target": "xla"} | ENTRIES[name].arguments(RICH)
    args = arrays_of(name, built_for(name, case))
    args[3] = jax.device_put(args[3], jax.NamedSharding(mesh, CACHE)) if name == "v3" else args[3]
    got = ENTRIES[name].call(*args, **how)
    out = got[0] if name == "v3" else got
    np.testing.assert_allclose(out, by_loops(name, build(case)), rtol=0, atol=CLOSE)


def test_a_mesh_alone_divides_nothing():
    np.testing.assert_array_equal(_on_mesh(), _page())


def test_one_kv_head_is_in_the_cache_once_and_each_device_writes_its_copy():
    mesh, _ = mesh_of({"kv_heads": 4})
    case = ENTRIES["v3"].case(RICH.replace(num_kv_heads=1), corner="mixed")
    want = ragged_page_attention_v3(
        *arrays_of("v3", built_for("v3", case)), target="xla", **ENTRIES["v3"].arguments(RICH)
    )
    args = arrays_of("v3", built_for("v3", case))
    args[3] = jax.device_put(args[3], jax.NamedSharding(mesh, P()))
    where = {"mesh": mesh, "in_specs": (HEADS, *[P()] * 7), "out_specs": (HEADS, P())}
    out, cache = ragged_page_attention_v3(*args, target="xla", **where, **ENTRIES["v3"].arguments(RICH))
    np.testing.assert_allclose(out, want[0], rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(cache, want[1])
    assert cache.sharding.is_fully_replicated


def test_v3_writes_each_head_as_often_as_devices_need_it():
    """The cache is packed, donated, and has two copies of each head; each device writes to its own pages and head."""
    mesh, _ = mesh_of({"kv_heads": 4, "context": 2})
    axes = paged.Axes(kv_heads="model", context="pages")
    case = ENTRIES["v3"].case(RICH, corner="mixed")
    args = arrays_of("v3", built_for("v3", case))
    pairs = jnp.repeat(args[3].reshape(*args[3].shape[:2], 2, 2, -1), 2, axis=2)
    pairs = jnp.pad(pairs, ((0, 1), *[(0, 0)] * 4), constant_values=jnp.nan)  # 24 pages, for two devices
    args[3] = jax.device_put(pairs, jax.NamedSharding(mesh, P("pages", None, "model")))
    out, after = ragged_page_attention_v3(*args, mesh=mesh, axes=axes, target="xla", **ENTRIES["v3"].arguments(RICH))
    np.testing.assert_allclose(out, by_loops("v3", build(case)), rtol=0, atol=CLOSE)
    assert args[3].is_deleted() and after.shape == pairs.shape
    np.testing.assert_array_equal(after[:, :, ::2], after[:, :, 1::2])
    assert np.isfinite(after).sum() > np.isfinite(pairs).sum(), "nothing was written"


def _page(**how):
    cache = jnp.ones((2, 8, 4, 8))
    return page_attention(jnp.ones((2, 4, 8)), cache, cache, [5, 1], [[0, 1], [2, 3]], **how)


def _on_mesh(**how):
    return _page(mesh=mesh_of({"kv_heads": 2, "context": 2})[0], **how)


REFUSALS = {
    "no mesh": (lambda: _page(axes=paged.Axes("model")), ValueError, "they need mesh="),
    "table": (lambda: _on_mesh(in_specs={"block_tables": P("model")}), ValueError, r"block_tables must be P\(\)"),
    "name": (lambda: _on_mesh(in_specs={"tables": P()}), ValueError, r"in_specs must be of .*got \['tables'\]"),
    "number": (lambda: _on_mesh(in_specs=(P(), P())), ValueError, "one for each of .*'query', 'key_cache'"),
    "kind": (lambda: _on_mesh(in_specs={"query": "model"}), TypeError, "spec of query must be a PartitionSpec"),
    "unlike": (
        lambda: _on_mesh(in_specs={"key_cache": P("model"), "value_cache": P(), "query": HEADS}),
        ValueError,
        "All caches, given and returned, need the same spec",
    ),
    "two outputs": (lambda: _on_mesh(out_specs=(P(), P())), ValueError, "out_specs must be a PartitionSpec; got"),
    "sequences": (lambda: _on_mesh(axes=paged.Axes(sequences="model")), ValueError, "Sequences cannot be divided here"),
    "heads": (
        lambda: _page(mesh=mesh_of({"kv_heads": 8})[0], axes=paged.Axes("model")),
        ValueError,
        "8 devices cannot share 4 query heads",
    ),
    "room": (
        lambda: ragged_page_attention_v3(
            jnp.ones((2, 4, 8)), *[jnp.ones((2, 2, 8))] * 2, jnp.ones((8, 4, 4, 8)), [1, 1], [0, 1], [0, 1, 2],
            [0, 0, 2], mesh=mesh_of({"kv_heads": 4})[0], axes=paged.Axes("model"),
        ),
        ValueError,
        r"kv_pages must be .*2 \* 4 heads",
    ),
    "rows": (
        lambda: ragged_page_attention_v2(
            jnp.ones((2, 4, 8)), jnp.ones((8, 4, 4, 8)), [1, 1], [[0], [1]], [0, 1, 2], 2,
            mesh=mesh_of({"sequences": 2})[0], in_specs={"query": P("data"), "kv_pages": P("data")},
        ),
        ValueError,
        "Sequences cannot be divided here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_argument(name):
    act, kind, text = REFUSALS[name]
    with pytest.raises(kind, match=text):
        act()
