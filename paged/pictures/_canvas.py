"""`Canvas`: SVG as text. It measures what it writes, so that no words overlap or are cut."""

import hashlib
import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ._style import CSS, PATTERNS, TILES

Number = int | float

# The width of each character in a wide sans-serif font, in parts of the font's size. Other fonts are narrower.
_WIDTHS = {
    **dict.fromkeys("ijlI|'", 0.3),
    **dict.fromkeys(" .,:;!", 0.34),
    **dict.fromkeys("ft()[]/-{}r\\", 0.42),
    **dict.fromkeys('sczkvxyJ*_"', 0.6),
    **dict.fromkeys("abdeghnopqu0123456789LFTPYE", 0.64),
    **dict.fromkeys("ABCKRSVXZ", 0.71),
    **dict.fromkeys("DGHNOQUw&", 0.82),
    **dict.fromkeys("+=<>#~^", 0.84),
    **dict.fromkeys("MmW@%", 1.0),
}
_MARGIN, _BOLD = 1.03, 1.12  # of each measured width, and of bold words besides
_RISE, _FALL = 0.8, 0.25  # of a line of text above and below its base line, in parts of the font's size


def text_width(words: str, size: Number, style: str = "t") -> Number:
    """How wide a line of text may be at most, in pixels, in any common sans-serif font.

    >>> text_width("page 12", 10) < text_width("page 123", 10) < 60
    True
    """
    return _MARGIN * (_BOLD if style == "h" else 1) * size * sum(_WIDTHS.get(letter, 1.0) for letter in words)


def wrapped(words: str, width: Number, size: Number, style: str = "t") -> list[str]:
    """Lines that are no wider than ``width``, broken between words; a longer word is broken too.

    >>> wrapped("one two three", text_width("one two", 10), 10)
    ['one two', 'three']
    """
    lines: list[str] = []
    for word in words.split():
        if lines and text_width(f"{lines[-1]} {word}", size, style) <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and text_width(lines[-1] + letter, size, style) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def shortened(words: str, width: Number, size: Number) -> str:
    """The text, or as much of it as ``width`` has room for, with "..." at its end."""
    if text_width(words, size) <= width:
        return words
    while words and text_width(words + "...", size) > width:
        words = words[:-1]
    return words + "..."


class Box(NamedTuple):
    """Where a line of text stands, at most: its upper left corner, its size, and the text."""

    x: Number
    y: Number
    width: Number
    height: Number
    words: str


class Canvas:
    """A picture that is being drawn, in pixels from the upper left corner."""

    def __init__(self, width: Number):
        self.width, self.bottom = width, 0.0
        self.boxes: list[Box] = []
        self._parts: list[str] = []
        self._patterns: set[str] = set()

    def text(
        self, x: Number, y: Number, words: str, *, size: Number = 12, anchor: str = "start", style: str = "t"
    ) -> Number:
        """Write a line whose base line is at ``y``. Gives its width."""
        width = text_width(words, size, style)
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        self.boxes.append(Box(left, y - _RISE * size, width, (_RISE + _FALL) * size, words))
        self._down_to(y + _FALL * size)
        at = "" if anchor == "start" else f' text-anchor="{anchor}"'
        label = html.escape(words)
        self._parts.append(f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}"{at}>{label}</text>')
        return width

    def lines(self, x: Number, y: Number, words: str, width: Number, *, size: Number = 12, style: str = "t") -> Number:
        """Write as many lines as the text needs. Gives the base line of a line after the last."""
        for line in wrapped(words, width, size, style):
            self.text(x, y, line, size=size, style=style)
            y += 1.4 * size
        return y

    def rect(self, x: Number, y: Number, width: Number, height: Number, style: str, corner: Number = 0) -> None:
        """Draw a rectangle."""
        self._down_to(y + height)
        rounded = f' rx="{_n(corner)}"' if corner else ""
        box = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        self._parts.append(f'<rect class="{style}" {box}{rounded}/>')

    def path(self, d: str, style: str, pattern: str | None = None) -> None:
        """Draw a path; filled with a pattern, if one is named."""
        fill = ""
        if pattern is not None:
            self._patterns.add(pattern)
            fill = f' style="fill:url(#{pattern}-ID)"'
        self._parts.append(f'<path class="{style}" d="{d}"{fill}/>')

    def line(self, x0: Number, y0: Number, x1: Number, y1: Number, style: str = "l") -> None:
        """Draw a line."""
        self._down_to(max(y0, y1))
        self.path(f"M{_n(x0)} {_n(y0)}L{_n(x1)} {_n(y1)}", style)

    def tiles_within(self, x: Number, y: Number, extent: tuple[Number, Number], size: Any, states: Any) -> None:
        """`tiles` of ``size`` in a panel. Those of the last row and column are as small as the panel leaves them."""
        panel = f'x="{_n(x)}" y="{_n(y)}" width="{_n(extent[0])}" height="{_n(extent[1])}"'
        inner, (width, height), last = Canvas(extent[0]), size, len(states) - 1
        if last:
            inner.tiles(0, 0, width, height, states[:-1])
        # A state shows by its height: a row that is cut would show another one. Columns are cut.
        inner.tiles(0, last * height, width, extent[1] - last * height, states[-1:])
        self._parts.append(f"<svg {panel}>{''.join(inner._parts)}</svg>")
        self._down_to(y + extent[1])

    def tiles(self, x: Number, y: Number, width: Number, height: Number, states: Any) -> None:
        """Draw a matrix of tiles of one size. ``states`` holds for each the letter of its state, or "" for no tile.

        A state has a height in its tile besides its colour, see `TILES`. Neighbours of one state are one stroke: so a
        matrix of thousands of tiles is a few kilobytes.
        """
        states = np.asarray(states, dtype="U1")
        rows, columns = states.shape
        for letter in sorted(set(np.unique(states)) - {""}):
            tile = TILES[letter]
            d = strokes(states == letter)
            place = f"translate({_n(x)} {_n(y + height * tile.middle)}) scale({_n(width)} {_n(height)})"
            self._parts.append(f'<path class="s{letter}" transform="{place}" stroke-width="{tile.height:g}" d="{d}"/>')
        if width >= 4 and columns > 1:
            gaps = "".join(f"M{_n(x + width * i)} {_n(y)}v{_n(height * rows)}" for i in range(1, columns))
            self.path(gaps, "g")
        self._down_to(y + height * rows)

    def legend(self, x: Number, y: Number, entries: Sequence[tuple[str, str]], width: Number) -> Number:
        """Write what letters of tiles and names of patterns mean. Gives the base line of a line after the last."""
        left, size = x, 12
        for letter, words in entries:
            needed = 22 + text_width(words, size)
            if left > x and left + needed > x + width:
                left, y = x, y + 20
            self.rect(left, y - 11, 14, 14, "o")
            if letter in PATTERNS:
                self.path(f"M{_n(left)} {_n(y - 11)}h14v14h-14z", "l", pattern=letter)
            elif letter:
                self.tiles(left, y - 11, 14, 14, [[letter]])
            self.text(left + 20, y, words, size=size)
            left += needed + 16
        return y + 20

    def svg(self, title: str, description: str, margin: Number = 12) -> str:
        """The whole picture. It names itself to who cannot see it."""
        height = math.ceil(self.bottom + margin)
        body = "".join(self._parts)
        patterns = "".join(PATTERNS[name] for name in sorted(self._patterns))
        own = "p" + hashlib.sha256((title + body).encode()).hexdigest()[:8]
        size = f'width="{_n(self.width)}" height="{height}" viewBox="0 0 {_n(self.width)} {height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="pgd" role="img" {size}'
        words = f'<title id="{own}-t">{html.escape(title)}</title><desc id="{own}-d">{html.escape(description)}</desc>'
        whole = (
            f'{head} aria-labelledby="{own}-t {own}-d">{words}<style>{CSS}</style>'
            f'<defs>{patterns}</defs><rect class="bg" width="100%" height="100%"/>{body}</svg>'
        )
        return whole.replace("-ID", f"-{own}").replace("<defs></defs>", "")

    def _down_to(self, y: Number) -> None:
        self.bottom = max(self.bottom, y)


def strokes(is_tile: np.ndarray) -> str:
    """A path that strokes every True of a matrix, as one line for each run of them in a row.

    >>> strokes(np.array([[True, True, False, True], [False, False, True, False]]))
    'M0 0h2m1 0h1M2 1h1'
    """
    edges = np.diff(np.pad(is_tile, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends, found, before = np.nonzero(edges == -1)[1], [], (-1, 0)
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        move = f"m{start - before[1]} 0" if row == before[0] else f"M{start} {row}"
        found.append(f"{move}h{end - start}")
        before = row, end
    return "".join(found)


def _n(x: Number) -> str:
    return f"{round(float(x), 2):g}"
