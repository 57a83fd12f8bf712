"""`AttentionSpec`, score operations and presets: values that print, compare, compose and refuse nonsense."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.spec import (
    ALiBi,
    And,
    AttentionSpec,
    Bias,
    Causal,
    Everything,
    Not,
    Or,
    Prefix,
    ScoreOp,
    SoftCap,
    Where,
    Window,
    presets,
)

SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)


def test_equal_declarations_are_one_value():
    again = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, scores=[])
    assert again == SPEC and hash(again) == hash(SPEC) and len({again, SPEC}) == 1
    changes = {"causal": False, "window": 4, "soft_cap": 3.0, "sinks": True, "scale": 1.0, "mask": Prefix(2)}
    changed = [SPEC.replace(**{name: value}) for name, value in changes.items()]
    assert len({SPEC, *changed}) == 1 + len(changes)


def test_replace_checks_again_and_undoes():
    assert SPEC.replace(window=8).replace(window=None) == SPEC
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        SPEC.replace(num_kv_heads=3)


def test_prints_what_differs_from_the_defaults():
    assert str(SPEC) == "AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)"
    assert str(SPEC.replace(window=4, causal=False)).endswith("head_dim=64, causal=False, window=4)")


def test_visibility_is_all_three_terms():
    assert SPEC.visibility == Causal()
    assert SPEC.replace(causal=False).visibility == Everything()
    assert SPEC.replace(window=4, mask=Prefix(2)).visibility == (Causal() & Window(4)).__class__(
        (Causal(), Window(4), Prefix(2))
    )
    assert SPEC.softmax_scale == 1 / math.sqrt(64) and SPEC.replace(scale=0.0).softmax_scale == 0.0


def test_the_cap_comes_before_the_other_scores():
    ops = SPEC.replace(soft_cap=5.0, scores=(ALiBi(), SoftCap(9.0))).score_ops
    assert [type(op) for op in ops] == [SoftCap, ALiBi, SoftCap] and ops[0].cap == 5.0
    assert len(ops[1].slopes) == 8


ERRORS = {
    "heads": ({"num_q_heads": 7}, ValueError, "num_q_heads must be a multiple.*num_q_heads=7, num_kv_heads=2"),
    "no heads": ({"num_q_heads": 0}, ValueError, "num_q_heads must be at least 1; got 0"),
    "half a head": ({"num_kv_heads": 2.0}, TypeError, r"num_kv_heads must be a Python int; got 2\.0"),
    "bool dim": ({"head_dim": True}, TypeError, "head_dim must be a Python int; got True"),
    "causal": ({"causal": 1}, TypeError, "causal must be True or False; got 1"),
    "sinks array": ({"sinks": np.ones(3)}, TypeError, "sinks must be True or False"),
    "window": ({"window": 0}, ValueError, r"Window\(0\) would hide"),
    "window type": ({"window": 2.5}, TypeError, r"Python int.*got 2\.5"),
    "cap 0": ({"soft_cap": 0.0}, ValueError, r"SoftCap\(0\.0\) is not a bound.*positive"),
    "cap -1": ({"soft_cap": -1}, ValueError, r"SoftCap\(-1\) is not a bound"),
    "cap inf": ({"soft_cap": math.inf}, ValueError, r"SoftCap\(inf\) is not a bound.*finite"),
    "cap nan": ({"soft_cap": math.nan}, ValueError, r"SoftCap\(nan\) is not a bound"),
    "no flag": ({"causal": None}, TypeError, "causal must be True or False; got None"),
    "text flag": ({"sinks": "no"}, TypeError, "sinks must be True or False; got 'no'"),
    "NumPy window": ({"window": np.int32(4)}, TypeError, r"Window's width must be a Python int.*int32\(4\)"),
    "text cap": ({"soft_cap": "5"}, TypeError, r"soft_cap\) must be a number.*got '5'"),
    "bool cap": ({"soft_cap": True}, TypeError, r"soft_cap\) must be a number.*got True"),
    "JAX cap": ({"soft_cap": jnp.ones(())}, TypeError, r"soft_cap\) must be a number.*got Array"),
    "cap that is 0 in float32": ({"soft_cap": 1e-50}, ValueError, r"SoftCap\(1e-50\) is not a bound"),
    "scale": ({"scale": math.inf}, ValueError, r"scale must be finite.*got inf.*leave it out"),
    "scale nan": ({"scale": math.nan}, ValueError, "scale must be finite.*got nan"),
    "scale that is infinite in float32": ({"scale": 1e300}, ValueError, r"scale must be finite.*got 1e\+300"),
    "huge scale": ({"scale": 10**400}, ValueError, "scale must be finite.*got 1000"),
    "text scale": ({"scale": "1"}, TypeError, "scale must be a number.*got '1'"),
    "bool scale": ({"scale": True}, TypeError, "scale must be a number.*got True"),
    "JAX scale": ({"scale": jnp.ones(())}, TypeError, "scale must be a number.*got Array"),
    "mask function": ({"mask": lambda p, j: True}, TypeError, r"mask must be a Mask.*Where\(lambda"),
    "score function": ({"scores": (abs,)}, TypeError, r"scores must be a tuple of.*built-in function abs"),
    "score alone": ({"scores": ALiBi()}, TypeError, r"scores must be a tuple of.*got ALiBi\(slopes=None\)"),
    "slopes": ({"scores": (ALiBi((1.0, 2.0)),)}, ValueError, "one slope per query head: the spec has 8, got 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_and_what_it_got(name):
    change, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        SPEC.replace(**change)


def test_soft_cap_saturates_and_keeps_small_scores():
    s = jnp.array([0.0, 1e-3, 5.0, 1e6, -1e6, jnp.inf])
    capped = SoftCap(5.0)(s, None, None, None)
    np.testing.assert_allclose(capped, [0.0, 1e-3, 5 * math.tanh(1), 5.0, -5.0, 5.0], rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 5, 8, 12])
def test_alibi_slopes_are_the_papers(heads):
    slopes = ALiBi().bind(heads).slopes
    power = 2 ** int(math.log2(heads))
    assert len(slopes) == heads and slopes[:power] == tuple(2.0 ** (-8 * (h + 1) / power) for h in range(power))
    assert slopes[power:] == tuple(2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power))
    s = ALiBi().bind(heads)(jnp.zeros((heads, 1)), 7, jnp.array([[4]]), jnp.arange(heads)[:, None])
    np.testing.assert_allclose(s[:, 0], -3 * np.array(slopes), rtol=1e-6)


def test_a_bias_is_added_in_the_scores_dtype():
    bias = Bias(lambda p, j, h: 10 * h + p - j)
    s = bias(jnp.ones((2, 1, 3)), jnp.array([[[5]]]), jnp.arange(3)[None, None], jnp.arange(2)[:, None, None])
    np.testing.assert_array_equal(s[:, 0], [[6, 5, 4], [16, 15, 14]])
    assert s.dtype == jnp.float32


def test_score_operations_refuse_what_they_cannot_be():
    with pytest.raises(TypeError, match=r"Bias needs a function fn\(p, j, h\) -> float; got 3"):
        Bias(3)
    with pytest.raises(ValueError, match="has no slopes before it is bound"):
        ALiBi()(jnp.zeros(1), 0, 0, 0)
    with pytest.raises(TypeError, match="abstract"):
        ScoreOp()


TERM_ERRORS = {
    "text slopes": (lambda: ALiBi("12"), TypeError, "slopes must be one number per query head.*got '12'"),
    "one slope": (lambda: ALiBi(0.5), TypeError, "slopes must be one number per query head.*got 0.5"),
    "text slope": (lambda: ALiBi([1, "2"]), TypeError, "slopes must be a number.*got '2'"),
    "slope nan": (lambda: ALiBi([math.nan]), ValueError, "slopes must be finite.*got nan"),
    "slopes 2d": (lambda: ALiBi(np.ones((2, 2))), TypeError, "slopes must be one number per query head"),
    "bool slopes": (lambda: ALiBi(np.ones(3, bool)), TypeError, "slopes must be a number.*got True"),
    "traced slopes": (
        lambda: jax.jit(lambda slopes: ALiBi(slopes).slopes)(jnp.ones(2)),
        TypeError,
        r"slopes must be numbers that are known.*Bias\(lambda",
    ),
    "bool bias": (
        lambda: Bias(lambda p, j, h: p > j)(jnp.ones(3), jnp.ones(3), jnp.ones(3), 0),
        TypeError,
        r"Bias needs fn\(p, j, h\) to return real numbers.*bool.*paged.Where",
    ),
    "bias shape": (
        lambda: Bias(lambda p, j, h: jnp.ones((4, 3)))(jnp.ones((2, 3)), 0, 0, 0),
        ValueError,
        r"Bias needs an elementwise function.*\(2, 3\).*returned \(4, 3\)",
    ),
    "mask shape": (
        lambda: Where(lambda p, j: jnp.ones((2, 3), bool))(1, jnp.arange(3)),
        ValueError,
        r"Where needs an elementwise function.*\(3,\).*returned \(2, 3\)",
    ),
    "no terms": (lambda: And(()), TypeError, r"And is made of masks.*got \(\)"),
    "list of terms": (lambda: Or([Causal()]), TypeError, r"Or is made of masks.*got \[Causal"),
    "no mask": (lambda: Not(3), TypeError, r"Not is made of masks.*got \(3,\)"),
}


@pytest.mark.parametrize("name", TERM_ERRORS)
def test_errors_of_terms_name_the_term_and_what_it_got(name):
    act, kind, text = TERM_ERRORS[name]
    with pytest.raises(kind, match=text):
        act()


def test_numbers_of_numpy_are_pythons_and_one_value_with_them():
    """Also their type: a float64 of NumPy would make scores float64 where a program allows 64 bits."""
    numpy = SPEC.replace(causal=np.False_, sinks=np.True_, soft_cap=np.float64(5), scale=np.float32(0.5))
    python = SPEC.replace(causal=False, sinks=True, soft_cap=5, scale=0.5)
    assert numpy == python and hash(numpy) == hash(python)
    assert [type(x) for x in (numpy.causal, numpy.sinks, numpy.soft_cap, numpy.scale)] == [bool, bool, float, float]
    assert ALiBi(np.array([0.5], np.float16)) == ALiBi(jnp.array([0.5])) == ALiBi((0.5,))


PRESETS = {name: fn for name, fn in vars(presets).items() if inspect.isfunction(fn)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_specs_with_a_source(name):
    spec = PRESETS[name]()
    assert isinstance(spec, AttentionSpec) and spec.causal
    assert "arXiv" in PRESETS[name].__doc__
    assert (spec.window is not None) == ("local" in name or name == "mistral_7b")
    assert spec.sinks == name.startswith("gpt_oss")


def test_presets_have_the_published_numbers():
    facts = {
        n: (s.num_q_heads, s.num_kv_heads, s.head_dim, s.window, s.soft_cap) for n, f in PRESETS.items() for s in [f()]
    }
    assert facts["llama3_8b"] == (32, 8, 128, None, None)
    assert facts["mistral_7b"] == (32, 8, 128, 4096, None)
    assert facts["gemma2_9b_local"] == (16, 8, 256, 4096, 50.0)
    assert facts["gpt_oss_20b_local"] == (64, 8, 64, 128, None)
