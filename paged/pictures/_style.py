"""Colours, tiles and patterns of all pictures: for light and for dark screens, and never by colour alone."""

from typing import NamedTuple


class Tile(NamedTuple):
    """How a state is drawn in a tile: where the middle of its bar is, and how high it is, in parts of the tile.

    ``ascii`` stands for it in text.
    """

    middle: float
    height: float
    ascii: str


# By letter. A state is known by the height of its bar, on any screen and to any eye.
TILES = {
    "F": Tile(0.5, 0.86, "#"),  # full
    "P": Tile(0.7, 0.46, "+"),  # partial
    "S": Tile(0.9, 0.1, "."),  # skipped
    "X": Tile(0.5, 0.2, "x"),  # freed
    "O": Tile(0.82, 0.26, "o"),  # held by others
    "2": Tile(0.05, 0.1, "s"),  # shared: drawn on top of another state
    "W": Tile(0.5, 0.86, "!"),  # wrong
    "D": Tile(0.7, 0.46, "d"),  # decoding
    "V": Tile(0.6, 0.66, "v"),  # decoding, with drafts
}

# Light and dark, by class. What no rule names is not painted.
_COLOURS = {
    "bg": ("#ffffff", "#15181e"),
    "ink": ("#1c2330", "#e8eaee"),
    "dim": ("#57606e", "#a9b2bf"),
    "line": ("#c6ccd5", "#48505c"),
    "full": ("#1f5fbf", "#74abff"),
    "partial": ("#b35900", "#ffb86b"),
    "skipped": ("#7b8594", "#8b95a3"),
    "shared": ("#7a3fb5", "#cda4ff"),
    "cached": ("#0f7566", "#57d3bd"),
    "bad": ("#c01f2e", "#ff828c"),
    "onfull": ("#ffffff", "#0b1020"),
    "panel": ("#f3f5f8", "#1f242c"),
}
_RULES = (
    ("rect.bg", "fill", "bg"),
    ("text.t", "fill", "ink"),
    ("text.h", "fill", "ink"),
    ("text.d", "fill", "dim"),
    ("text.w", "fill", "bad"),
    ("text.n", "fill", "onfull"),
    (".l", "stroke", "line"),
    (".k", "stroke", "dim"),
    (".g", "stroke", "bg"),
    (".o", "stroke", "line"),
    (".q", "stroke", "dim"),
    (".e", "fill", "panel"),
    (".sF", "stroke", "full"),
    (".sP", "stroke", "partial"),
    (".sS,.sO", "stroke", "skipped"),
    (".sX,.sW", "stroke", "bad"),
    (".s2", "stroke", "shared"),
    (".sD", "stroke", "partial"),
    (".sV", "stroke", "cached"),
    (".fF", "fill", "full"),
    (".fP", "fill", "partial"),
    (".fW", "fill", "bad"),
    (".ps", "stroke", "shared"),
    (".pc", "fill", "cached"),
    (".pa", "stroke", "partial"),
)
_FIXED = (
    ".pgd{max-width:100%;height:auto}"
    '.pgd text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}'
    ".pgd .h{font-weight:600}.pgd path{fill:none}.pgd .o,.pgd .q,.pgd .k{fill:none}.pgd .g{stroke-width:1}"
    ".pgd .q{stroke-dasharray:3 2}"
)


def _rules(which: int) -> str:
    names = [(", ".join(f".pgd {part}" for part in rule.split(",")), kind, name) for rule, kind, name in _RULES]
    return "".join(f"{rule}{{{kind}:{_COLOURS[name][which]}}}" for rule, kind, name in names)


CSS = f"{_FIXED}{_rules(0)}@media(prefers-color-scheme:dark){{{_rules(1)}}}"

_PATTERN = '<pattern id="{name}-ID" width="{size}" height="{size}" patternUnits="userSpaceOnUse">{inside}</pattern>'
PATTERNS = {
    "stripes": _PATTERN.format(
        name="stripes", size=6, inside='<path class="ps" d="M-1 1l2-2M0 6l6-6M5 7l2-2" stroke-width="1.6"/>'
    ),
    "dots": _PATTERN.format(name="dots", size=6, inside='<circle class="pc" cx="3" cy="3" r="1.5"/>'),
    "bars": _PATTERN.format(name="bars", size=5, inside='<path class="pa" d="M0 2.5h5" stroke-width="1.8"/>'),
}
