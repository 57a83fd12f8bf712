"""The decode table as a picture, where matplotlib can be imported."""

import pathlib

from benchmarks.pyplot import pyplot

from .measure import Row


def plot(rows: list[Row], path: pathlib.Path) -> str:
    """Draw the share of READ on one core by case; returns what to tell the user."""
    try:
        plt = pyplot()
    except ImportError as error:
        return f"No plot: matplotlib is not importable ({error})."
    shown = [row for row in rows if row.section == "decode" and row.cores == "one" and row.name == "paged"]
    shown = [row for row in shown if row.ratio is not None]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
    axes.barh([row.case for row in shown], [row.ratio for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("share of READ on one core (measured)")
    figure.savefig(path, dpi=120)
    return f"Plot: {path}"
