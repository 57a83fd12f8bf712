"""What a served load is judged by."""

import statistics
from typing import Any


def report(arrivals: list, first: list, last: list, tokens: list, **more: Any) -> dict[str, Any]:
    """Figures of a served load.

    **Arguments:**

    - `arrivals`, `first`, `last`: seconds at which each request came, had its first token, and was done.
    - `tokens`: each answer's token ids.
    - `more`: other figures.
    """
    to_first = [f - a for f, a in zip(first, arrivals, strict=True)]
    each = [(z - f) / (len(t) - 1) for f, z, t in zip(first, last, tokens, strict=True) if len(t) > 1]
    return {
        "tokens": tokens,
        "seconds": max(last),
        "tokens_per_second": sum(map(len, tokens)) / max(last),
        "first_token": quantiles(to_first),
        "per_token": quantiles(each),
        "done": sorted(last),
        **more,
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """The median and the 95th percentile; zeros for no values."""
    if len(values) < 2:
        return dict.fromkeys(("median", "p95"), values[0] if values else 0.0)
    return {"median": statistics.median(values), "p95": statistics.quantiles(values, n=20, method="inclusive")[-1]}
