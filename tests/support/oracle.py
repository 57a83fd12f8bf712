"""An oracle of scalar loops in float64, written from `docs/semantics.md` alone: it shares no code with the library."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Pool = np.ndarray  # [pages, kv_heads, page_size, dim], float64


class Asked(NamedTuple):
    """What is known of a row and a key beyond their positions."""

    numbers: Mapping[str, Any] = {}  # the sequence's, by name; several of them as a list
    head: int | None = None
    heads: int | None = None
    is_ancestor: bool | None = None


NOTHING_ASKED = Asked()


def attention_by_loops(spec, q, k: Pool, v: Pool, lengths, tables, starts, num_seqs, sinks=None, brought=None):
    """``(out [tokens, q_heads, value_dim], lse [tokens, q_heads])`` of a spec, one row, head and key at a time.

    ``brought`` has the batch's ``values``, ``positions`` and ``ancestors``, as NumPy arrays or None.
    """
    heads, kv_heads, brought = spec.num_q_heads, spec.num_kv_heads, brought or {}
    pages, _, size, value_dim = v.shape
    out, lse = np.zeros((len(q), heads, value_dim)), np.full((len(q), heads), -np.inf)
    for s in range(min(max(num_seqs, 0), len(lengths))):
        length = max(int(lengths[s]), 0)
        rows = int(starts[s + 1]) - int(starts[s])
        numbers = {name: np.asarray(x)[s].tolist() for name, x in (brought.get("values") or {}).items()}
        for i in range(rows):
            row = int(starts[s]) + i
            p = _position(brought, length - rows + i, row)
            for h in range(heads):
                scores, values = [], []
                for place in range(min(length, tables.shape[1] * size)):
                    page, own = int(tables[s][place // size]), place - (length - rows)
                    j = place if own < 0 else _position(brought, place, int(starts[s]) + own)
                    asked = Asked(numbers, h, heads, _is_ancestor(brought, row, i, own))
                    if is_visible_by_rule(spec, p, j, asked) and 0 <= page < pages:
                        at = (page, h // (heads // kv_heads), place % size)
                        scores.append(_score(spec, q[row, h], k[at], p, j, asked))
                        values.append(v[at])
                extra = _sink_logits(spec, sinks, h)
                out[row, h], lse[row, h] = _softmax(scores, values, extra, value_dim)
    return out, lse


def _position(brought, place, row):
    """What masks and scores see of a row, or of the row's own token as a key."""
    return place if brought.get("positions") is None else int(brought["positions"][row])


def _is_ancestor(brought, row, i, own):
    """Whether token ``own`` of this step is row ``i`` itself, or has its bit set; True before the step."""
    if own < 0 or own == i or brought.get("ancestors") is None:
        return True
    word, bit = divmod(own, 32)
    return word < brought["ancestors"].shape[1] and bool(int(brought["ancestors"][row, word]) >> bit & 1)


def _score(spec, q, k, p, j, asked):
    scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
    s = scale * sum(float(a) * float(b) for a, b in zip(q, k, strict=True))
    if spec.soft_cap is not None:
        s = _capped(s, spec.soft_cap, asked)
    for op in spec.scores:
        kind = type(op).__name__
        if kind == "ALiBi":
            s += _slope(_number(op.slopes, asked), spec.num_q_heads, asked.head) * (j - p)
        elif kind == "Bias":
            s += float(op.fn(p, j, asked.head, *(_number(value, asked) for value in op.values)))
        elif kind == "SoftCap":
            s = _capped(s, op.cap, asked)
        else:
            raise NotImplementedError(kind)
    return s


def _capped(s, cap, asked):
    """A cap below the smallest number of float32 counts as it."""
    cap = max(_number(cap, asked), 2.0**-126)
    return cap * math.tanh(s / cap)


def _number(number, asked):
    """A number, or several, where a batch may bring them by name."""
    return asked.numbers[number.name] if type(number).__name__ == "Value" else number


def _slope(slopes, heads, h):
    """Of a power of two n: 2 ** (-8 (h + 1) / n); else those of the power below, then every other of that above."""
    if slopes is not None:
        return slopes[h]
    n = 1
    while 2 * n <= heads:
        n *= 2
    if h < n:
        return 2.0 ** (-8 * (h + 1) / n)
    return 2.0 ** (-8 * (2 * (h - n) + 1) / (2 * n))


def is_visible_by_rule(spec, p, j, asked=NOTHING_ASKED):
    """The mask of a spec at one pair, by the rules of its terms."""
    if spec.causal and not j <= p:
        return False
    if spec.window is not None and not p - j < max(_number(spec.window, asked), 1):
        return False
    return spec.mask is None or mask_by_rule(spec.mask, p, j, asked)


def mask_by_rule(mask, p, j, asked=NOTHING_ASKED) -> bool:
    """A mask at one pair of Python integers."""
    kind = type(mask).__name__
    if kind in ("And", "Or"):
        return (all if kind == "And" else any)(mask_by_rule(term, p, j, asked) for term in mask.terms)
    rules = {
        "Everything": lambda: True,
        "Nothing": lambda: False,
        "Causal": lambda: j <= p,
        "Window": lambda: p - j < max(_number(mask.width, asked), 1),
        "Prefix": lambda: j < _number(mask.size, asked),
        "Chunk": lambda: _chunk(j, mask, asked) == _chunk(p, mask, asked),
        "Spans": lambda: any(
            a <= p < b and a <= j < b
            for a, b in zip(_number(mask.starts, asked), _number(mask.ends, asked), strict=True)
        ),
        "Segments": lambda: _segment(p, mask, asked) == _segment(j, mask, asked),
        "PerHead": lambda: mask_by_rule(mask.masks[asked.head * len(mask.masks) // asked.heads], p, j, asked),
        "Tree": lambda: asked.is_ancestor,
        "Where": lambda: _of_function(mask, p, j, asked),
        "Not": lambda: not mask_by_rule(mask.term, p, j, asked),
    }
    return rules[kind]()


def _chunk(position, mask, asked):
    return math.floor(position / max(_number(mask.size, asked), 1))


def _segment(position, mask, asked):
    """How many segments have started up to a position."""
    return sum(start <= position for start in _number(mask.starts, asked))


def _of_function(mask, p, j, asked):
    head = (asked.head,) if mask.has_heads else ()
    return bool(mask.fn(p, j, *head, *(_number(value, asked) for value in mask.values)))


def _sink_logits(spec, sinks, h):
    """The extra logits of query head ``h``, from ``[q_heads]`` or ``[q_heads, n]``."""
    return [] if sinks is None else list(np.asarray(sinks, np.float64).reshape(spec.num_q_heads, -1)[h])


def _softmax(scores, values, extra, value_dim):
    logits = scores + extra
    if not logits:
        return np.zeros(value_dim), -np.inf
    top = max(logits)
    total = math.fsum(math.exp(s - top) for s in logits)
    out = np.zeros(value_dim)
    for s, value in zip(scores, values, strict=True):
        out += math.exp(s - top) / total * value
    return out, top + math.log(total)
