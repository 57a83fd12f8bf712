"""Requests done over time as a picture, where matplotlib can be imported."""

import importlib
import pathlib
from typing import Any


def plot(served: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> str:
    """Draw, for the last round of each server, how many requests were done when; returns what to tell the user."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        return f"No plot: matplotlib is not importable ({error})."
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for style, (name, rounds) in zip(("-", "--", ":"), served.items(), strict=False):
        done = rounds[-1]["done"]
        axes.step([0.0, *done], range(len(done) + 1), style, where="post", label=name)
    axes.set_xlabel("seconds (measured)")
    axes.set_ylabel("requests done")
    axes.legend()
    figure.savefig(path, dpi=120)
    return f"Plot: {path}"
