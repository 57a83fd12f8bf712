"""An oracle of scalar loops in float64, written from `docs/semantics.md` alone: it shares no code with the library."""

import math

import numpy as np

Pool = np.ndarray  # [pages, kv_heads, page_size, dim], float64


def attention_by_loops(spec, q, k: Pool, v: Pool, lengths, tables, starts, num_seqs, sinks=None):
    """``(out [tokens, q_heads, value_dim], lse [tokens, q_heads])`` of a spec, one row, head and key at a time."""
    heads, kv_heads = spec.num_q_heads, spec.num_kv_heads
    pages, _, size, value_dim = v.shape
    out, lse = np.zeros((len(q), heads, value_dim)), np.full((len(q), heads), -np.inf)
    for s in range(min(max(num_seqs, 0), len(lengths))):
        length = max(int(lengths[s]), 0)
        rows = int(starts[s + 1]) - int(starts[s])
        for i in range(rows):
            p, row = length - rows + i, int(starts[s]) + i
            for h in range(heads):
                scores, values = [], []
                for j in range(min(length, tables.shape[1] * size)):
                    page = int(tables[s][j // size])
                    if is_visible_by_rule(spec, p, j) and 0 <= page < pages:
                        at = (page, h // (heads // kv_heads), j % size)
                        scores.append(_score(spec, q[row, h], k[at], p, j, h))
                        values.append(v[at])
                extra = _sink_logits(spec, sinks, h)
                out[row, h], lse[row, h] = _softmax(scores, values, extra, value_dim)
    return out, lse


def _score(spec, q, k, p, j, h):
    scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
    s = scale * sum(float(a) * float(b) for a, b in zip(q, k, strict=True))
    if spec.soft_cap is not None:
        s = spec.soft_cap * math.tanh(s / spec.soft_cap)
    for op in spec.scores:
        kind = type(op).__name__
        if kind == "ALiBi":
            s += _slope(op.slopes, spec.num_q_heads, h) * (j - p)
        elif kind == "Bias":
            s += float(op.fn(p, j, h))
        elif kind == "SoftCap":
            s = op.cap * math.tanh(s / op.cap)
        else:
            raise NotImplementedError(kind)
    return s


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


def is_visible_by_rule(spec, p, j):
    """The mask of a spec at one pair, by the rules of its terms."""
    if spec.causal and not j <= p:
        return False
    if spec.window is not None and not p - j < spec.window:
        return False
    return spec.mask is None or mask_by_rule(spec.mask, p, j)


def mask_by_rule(mask, p, j) -> bool:
    """A mask at one pair of Python integers."""
    kind = type(mask).__name__
    if kind in ("And", "Or"):
        return (all if kind == "And" else any)(mask_by_rule(term, p, j) for term in mask.terms)
    rules = {
        "Everything": lambda: True,
        "Nothing": lambda: False,
        "Causal": lambda: j <= p,
        "Window": lambda: p - j < mask.width,
        "Prefix": lambda: j < mask.size,
        "Chunk": lambda: math.floor(j / mask.size) == math.floor(p / mask.size),
        "Where": lambda: bool(mask.fn(p, j)),
        "Not": lambda: not mask_by_rule(mask.term, p, j),
    }
    return rules[kind]()


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
