"""The words of other libraries: each of their arguments is known here, in their order, and is documented."""

import ast
import inspect
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged import compat
from paged.compat import names
from paged.compat.names import WORDS

from .entries import ENTRIES, RICH, arrays_of, built_for
from .signatures import CFG_FIELDS, SIGNATURES

ENTRY_POINTS = {entry.call.__name__: name for name, entry in ENTRIES.items()}
# sglang-jax has an array before `distribution` that no entry point takes: its functions are called by names.
BY_NAME = {row.function for row in SIGNATURES if row.peer == "sglang-jax"}
every_row = pytest.mark.parametrize("row", SIGNATURES, ids=lambda row: f"{row.peer}: {row.function}")


def own_parameters(row):
    """The parameters of our entry point, by name."""
    return inspect.signature(getattr(compat, row.entry)).parameters


@every_row
def test_every_argument_is_known_and_positions_are_the_same(row):
    own, words = own_parameters(row), WORDS[row.entry]
    order = [name for name, p in own.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    for place, (name, kind, _) in enumerate(row.parameters):
        assert name in own or name in words or name == "cfg", name
        if kind != "keyword" and row.function not in BY_NAME:
            assert words.get(name, name) == order[place], name


def test_no_word_hides_an_argument():
    for entry, words in WORDS.items():
        assert not set(words) & set(inspect.signature(getattr(compat, entry)).parameters), entry


PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "porting.md").read_text()
SECTIONS = {
    "JAX": "From JAX's kernels",
    "ejkernel kernels": "From ejkernel and EasyDeL",
    "ejkernel operations": "From ejkernel and EasyDeL",
    "EasyDeL": "From ejkernel and EasyDeL",
    "tpu-inference": "From tpu-inference",
    "sglang-jax": "From sglang-jax",
}


def named_in(section):
    """The names in the first column of the tables of a section of docs/porting.md."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.parametrize("peer", SECTIONS)
def test_docs_porting_names_every_argument_of_every_peer(peer):
    missing = {p.name for row in SIGNATURES if row.peer == peer for p in row.parameters} - named_in(SECTIONS[peer])
    assert not missing


# What a call passes for an argument whose default says nothing, by the argument's own name here.
SAID = {"scale": 0.3, "softmax_aux": None}


def as_the_peer_calls(row, built):
    """Positional arguments and keywords of a call with the peer's names, every default spelled out."""
    entry, words = ENTRIES[ENTRY_POINTS[row.entry]], WORDS[row.entry]
    order = list(own_parameters(row))
    arrays = dict(zip(order, arrays_of(ENTRY_POINTS[row.entry], built), strict=False))
    told = {**arrays, entry.scale: RICH.scale, entry.soft_cap: RICH.soft_cap, "sliding_window": RICH.window}
    args, kwargs = [], {}
    for name, kind, default in row.parameters:
        own = words.get(name, name)
        value = None if default in (None, "bfloat16") else ast.literal_eval(default)
        value = told.pop(own) if isinstance(own, str) and own in told else value
        value = {"bfloat16": jnp.bfloat16}.get(default, value)
        value = {"optimized": False, "pages_per_compute_block": 1}.get(name, value) if default is None else value
        if kind == "positional only":
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs, told


@every_row
def test_a_call_in_the_words_of_a_peer_is_the_same_call(row):
    name = ENTRY_POINTS[row.entry]
    built = built_for(name, ENTRIES[name].case(RICH))
    args, kwargs, told = as_the_peer_calls(row, built)
    assert {k for k, v in told.items() if v is not None} <= {
        ENTRIES[name].scale,
        ENTRIES[name].soft_cap,
        "sliding_window",
    }
    got = ENTRIES[name].call(*args, **{"platform": "xla", **kwargs}, **told)
    want = ENTRIES[name].call(*arrays_of(name, built), **ENTRIES[name].arguments(RICH))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("entry", CFG_FIELDS)
def test_a_cfg_stands_for_its_fields_and_arguments_go_first(entry):
    call = ENTRIES[ENTRY_POINTS[entry]].call
    own = inspect.signature(call).parameters
    cfg = types.SimpleNamespace(**dict.fromkeys(CFG_FIELDS[entry], 2), platform="xla", backend="any")
    given, words = names._translated(entry, WORDS[entry], tuple(own), 0, {"cfg": cfg})
    seen = {name: value for name, value in given.items() if name != "target"}
    assert given["target"] == "xla"
    assert seen == {name: 2 for name in CFG_FIELDS[entry] if name in own}
    assert all(words[name] == f"cfg.{name}" for name in seen)
    given, _ = names._translated(
        entry, WORDS[entry], tuple(own), 0, {"cfg": cfg, "target": "tpu", **dict.fromkeys(seen, 3)}
    )
    assert given == {"target": "tpu", **dict.fromkeys(seen, 3)}


Q, KV, CACHE = jnp.ones((3, 4, 8)), jnp.ones((3, 2, 8)), jnp.ones((6, 4, 4, 8))
LENGTHS, TABLES, STARTS = np.array([5, 1, 0]), np.array([[3, 1], [0, -1], [-1, -1]]), np.array([0, 1, 2, 3])


def v2(*args, **kwargs):
    given = {"kv_pages": CACHE, "context_lens": LENGTHS, "block_tables": TABLES, "query_start_loc": STARTS}
    return compat.ragged_page_attention_v2(*args, **{**given, "num_seqs": 3, **kwargs})


def v3(**kwargs):
    arrays = [Q, KV, KV, CACHE + 0, LENGTHS, TABLES.reshape(-1), STARTS, [0, 0, 3]]
    return compat.ragged_page_attention_v3(*arrays, **kwargs)


def in_jax_words(**changes):
    given = {"kv_lens": LENGTHS, "page_indices": TABLES, "cu_q_lens": STARTS, "num_seqs": 3}
    return compat.ragged_page_attention_v2(Q, CACHE, **{**given, **changes})


REFUSED = {
    "unknown": (lambda: v2(Q, num_kv_page_per_block=1), TypeError,
                r"v2\(\) has no argument num_kv_page_per_block. Did you mean num_kv_pages_per_block"),
    "nothing like it": (lambda: v2(Q, xyz=1), TypeError, "has no argument xyz. docs/porting.md lists the names"),
    "twice": (lambda: v2(query=Q, q=Q), TypeError, "got query twice: by query, and as q"),
    "by position and name": (lambda: v2(Q, q=Q), TypeError, "got query twice: by position, and as q"),
    "by two words": (lambda: v2(q=Q, queries=Q), TypeError, "got query twice: by q, and as queries"),
    "platform": (lambda: v2(Q, platform="triton"), ValueError, 'platform must be "xla", "pallas".*run as "xla"'),
    "cfg": (lambda: v2(Q, cfg=types.SimpleNamespace(block_q=1)), TypeError, r"cfg has fields.*\['block_q'\]"),
    "debug_mode": (lambda: v3(debug_mode=True), ValueError, "debug_mode must be left out, or False: .*explain says"),
    "custom_mask": (lambda: v3(custom_mask=jnp.ones(3)), ValueError, "custom_mask must be .*paged.Mask, such as"),
    "temperature": (lambda: v3(xai_temperature_len=8.0), ValueError, "xai_temperature_len must be .*beforehand"),
    "cu_kv_lens": (lambda: v3(cu_kv_lens=jnp.zeros(4, int)), ValueError, "cu_kv_lens must be .*docs/porting.md has"),
    "aligned": (lambda: v3(mask_aligned_to_cu_kv=True), ValueError, "mask_aligned_to_cu_kv must be left out"),
    "causal": (lambda: v3(causal=2), ValueError, "causal must be 1 or 0; got 2"),
    "softmax_dtype": (lambda: v3(softmax_dtype="int8"), TypeError, "softmax_dtype must be .*The softmax is float32"),
    "hint": (lambda: v3(chunk_prefill_size=0), ValueError, "chunk_prefill_size must be at least 1; got 0"),
    "hint of a GPU": (lambda: v2(Q, num_warps="4"), TypeError, "num_warps must be a Python int; got '4'"),
    "blocks": (lambda: v3(d_block_sizes=(1, 2)), TypeError, "d_block_sizes must be four sizes"),
    "bounds": (lambda: v3(disable_bounds_checks=None), TypeError, "disable_bounds_checks must be True or False"),
    # Errors speak of the arguments as the caller named them.
    "queries": (lambda: v2(queries=Q[0]), ValueError, r"^queries must be \[tokens, heads, head_dim\]"),
    "kv_lens": (lambda: in_jax_words(kv_lens=LENGTHS[None]), ValueError, r"^kv_lens must be \[seqs\]"),
    "cu_q_lens": (lambda: in_jax_words(cu_q_lens=STARTS[:3]), ValueError, "^cu_q_lens must be .*with kv_lens' seqs"),
    "sm_scale": (lambda: v2(Q, sm_scale=np.inf), ValueError, "^sm_scale must be finite"),
    "soft_cap": (lambda: v2(Q, soft_cap=0.0), ValueError, "^soft_cap must be positive"),
    "attention_sink": (lambda: v3(attention_sink=jnp.zeros((3, 4))), ValueError,
                       r"^attention_sink must be \[q_heads\] = \[4\].*one sink of each query head"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_words_without_a_meaning_are_refused_by_name_with_what_to_write(name):
    act, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        act()
