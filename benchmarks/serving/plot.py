"""Requests done over time as a picture, where matplotlib can be imported."""

import pathlib
from typing import Any

from benchmarks.pyplot import pyplot


def plot(served: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> str:
    """Draw, for the last round of each server, how many requests were done when; returns what to tell the user."""
    try:
        plt = pyplot()
    except ImportError as error:
        return f"No plot: matplotlib is not importable ({error})."
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for style, (name, rounds) in zip(("-", "--", ":"), served.items(), strict=False):
        done = rounds[-1]["done"]
        axes.step([0.0, *done], range(len(done) + 1), style, where="post", label=name)
    axes.set_xlabel("seconds (measured)")
    axes.set_ylabel("requests done")
    axes.legend()
    figure.savefig(path, dpi=120)
    return f"Plot: {path}"
