"""`save` and `load`: bit for bit, into every page order and onto devices; what does not fit is refused by name."""

import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import paged
from paged.files import open_safetensors, write_safetensors
from paged.runtime import GroupedPool, LayerStack, PagedAttention, PagePool, PrefixCache, load, pools_of, save
from paged.spec import PAGE_ORDERS

from .tiny import EMBED, GLOBAL, LAYOUT, LOCAL

DTYPES = [
    pytest.param(jnp.bfloat16, None, id="bfloat16", marks=pytest.mark.kernels),
    pytest.param(jnp.int8, "token", id="int8"),
    pytest.param(jnp.float32, None, id="float32", marks=pytest.mark.kernels),
    pytest.param(jnp.float8_e4m3fn, "head", id="float8", marks=pytest.mark.kernels),
]


def filled(tree, seed=0):
    """A tree of the same arrays with random bits, NaN among them."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    random = [rng.integers(0, 256, x.nbytes, np.uint8).view(x.dtype).reshape(x.shape) for x in leaves]
    return jax.tree.unflatten(structure, list(map(jnp.asarray, random)))


def bits(tree):
    return [np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes() for x in jax.tree.leaves(tree)]


class Model(eqx.Module):
    """A run of layers, a layer alone, and a state that is no pages."""

    stack: LayerStack
    single: PagedAttention
    count: eqx.nn.StateIndex

    def __init__(self, key):
        make = lambda key: PagedAttention(LOCAL, LAYOUT, 5, EMBED, key=key)
        self.stack = LayerStack.make(make, jax.random.split(key, 3))
        self.single = PagedAttention(GLOBAL, LAYOUT, 8, EMBED, key=key)
        self.count = eqx.nn.StateIndex(jnp.int32(7))


@functools.cache
def serving(num_pages=8, window=LOCAL.window):
    _, state = eqx.filter_jit(eqx.nn.make_with_state(Model))(jax.random.key(0))
    specs = [LOCAL.replace(window=window), GLOBAL]
    pool = GroupedPool.init(specs, num_pages, num_slots=2, pages_per_seq=4, page_size=4, chunk_size=4)
    return state, pool


def test_states_and_pools_come_back_bit_for_bit(tmp_path):
    state, pool = serving()
    made = state, (pool, PrefixCache.init(pool.pools[0])), {"more": jnp.arange(3.0)}
    tree = filled(made)
    save(tmp_path / "a", tree)
    like = (*made[:2], {"more": jax.ShapeDtypeStruct((3,), jnp.float32)})
    got = load(tmp_path / "a", like)
    assert bits(got) == bits(tree) != bits(made)
    assert [held.num_pages for held in pools_of(got[0])] == [5, 8] and isinstance(got[0], eqx.nn.State)
    assert not any(x.is_deleted() for x in jax.tree.leaves(made)), "what it is like is not changed"
    save(tmp_path / "a", made)  # over the file that is there
    assert bits(load(tmp_path / "a", like)) == bits(made)


@pytest.mark.parametrize(("dtype", "scales"), DTYPES)
def test_pages_come_back_in_every_order(tmp_path, dtype, scales, monkeypatch):
    monkeypatch.setattr(paged.runtime._page_order, "_BLOCK", 2**11)  # several blocks of pages
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=16, dtype=dtype, scales=scales)
    pages = {order: filled(layout.replace(order=order).init(7)) for order in PAGE_ORDERS}
    for order, own in pages.items():
        save(tmp_path / order, [own])
        for other in PAGE_ORDERS:
            like = layout.replace(order=other).init(7)
            (got,) = load(tmp_path / order, [like])
            assert got.layout == like.layout and bits((got.k_scale, got.v_scale)) == bits((own.k_scale, own.v_scale))
            assert logical(got) == logical(own), (order, other)
            if other == order:
                assert bits(got) == bits(own)


def logical(pages):
    """The bits of keys and values as [pages, heads, offsets, dim]."""
    layout, parts = pages.layout, []
    for which in (0, 1):
        arrays = tuple(jnp.asarray(np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")) for x in pages.arrays)
        raw = layout._half(arrays, layout.array_axes, which)
        axes = ["head" if axis == "kv_head" else axis for axis in layout.array_axes[0] if axis != "kv"]
        parts.append(np.asarray(jnp.transpose(raw, [*map(axes.index, ("page", "head", "offset")), 3])))
    return bits(parts)


def test_parts_of_divided_arrays_are_read_alone(tmp_path, monkeypatch):
    layout = paged.PageLayout(page_size=4, num_kv_heads=4, head_dim=8)
    pages = filled(layout.init(6))
    save(tmp_path / "a", pages)
    mesh = Mesh(np.array(jax.devices()[:2]), ("heads",))
    like = jax.device_put(layout.init(6), NamedSharding(mesh, P(None, None, "heads")))
    sizes, read = [], paged.files.Tensor.read
    monkeypatch.setattr(
        paged.files.Tensor, "read", lambda self, index=(): sizes.append((got := read(self, index)).size) or got
    )
    got = load(tmp_path / "a", like)
    assert bits(got) == bits(pages) and got.arrays[0].sharding == like.arrays[0].sharding
    assert sizes == [pages.arrays[0].size // 2] * 2


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    state, pool = serving()
    path = tmp_path / "serving.safetensors"
    save(path, (state, pool), tag="weights 1")
    like = serving()

    def refuses(text, like=like, tag="weights 1", path=path):
        with pytest.raises(ValueError, match=text):
            load(path, like, tag=tag)

    refuses("serving.safetensors has the tag 'weights 1', and tag='' was asked for", tag="")
    refuses("another structure", like=(like[0],))
    refuses(r"tree\[1\].pools\[0\].ref_counts must be int32\[9\], and is int32\[8\]", like=(like[0], serving(9)[1]))
    refuses("tree.1. has masks = .*p - j < 5.* in the file, and .*p - j < 6", like=(like[0], serving(window=6)[1]))
    wider = PagePool.init(8, 2, 2, 8)
    refuses("page_size = 4 in the file, and 8 in", like=(like[0], eqx.tree_at(lambda p: p.pools[0], pool, wider)))
    refuses("tree .* kind|kind = 'array'|has name", like=(like[1], like[0]))
    more = eqx.tree_at(lambda p: p.pools[0].lengths, pool, jnp.zeros(2))
    refuses(r"lengths must be float32\[2\], and is int32\[2\]", like=(like[0], more))
    save(tmp_path / "pages", LAYOUT.init(3))
    for change, text in ({"page_size": 2}, "'page_size': 4"), ({"dtype": jnp.bfloat16}, "'dtype': 'float32'"):
        refuses(f"tree has layout = .*{text}", LAYOUT.replace(**change).init(3), "", tmp_path / "pages")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", like)
    with pytest.raises(TypeError, match=r"tree\['a'\] must be an array; got int"):
        save(path, {"a": 1})
    assert bits(load(path, like, tag="weights 1")) == bits((state, pool)), "a save that fails replaces nothing"


def test_files_that_are_cut_off_damaged_or_foreign_are_refused(tmp_path):
    pool, path = PagePool.init(4, 1, 2, 2), tmp_path / "a"
    save(path, pool)
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a: "):
            load(path, pool)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="a: tensors fill bytes"):
        load(path, pool)
    path.write_bytes(whole)
    weights = open_safetensors(path)
    arrays, metadata = {name: np.array(x.read()) for name, x in weights.items()}, weights.metadata
    write_safetensors(path, arrays)
    with pytest.raises(ValueError, match=r"was not written by paged.runtime.save"):
        load(path, pool)
    for parts in ("", "{", "[1]", "{}", "[" * 10**5, json.dumps([{}] * 6), json.dumps([{"layout": 3}] * 6)):
        write_safetensors(path, arrays, {**metadata, "parts": parts})
        with pytest.raises(ValueError, match=r"a\b"):
            load(path, pool)
    for change, text in ({"tree.lengths": None}, "is missing"), ({"more": np.zeros(1)}, "more is of no part"):
        changed = {name: x for name, x in (arrays | change).items() if x is not None}
        write_safetensors(path, changed, metadata)
        with pytest.raises(ValueError, match=text):
            load(path, pool)
