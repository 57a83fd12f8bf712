"""`Picture` and `Page`: what drawing gives. Both show themselves in notebooks, print as text, and save as files."""

import dataclasses
import html
import os
import pathlib

from ._canvas import Box, Canvas


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as SVG, and as plain text. A notebook shows the SVG; ``print`` shows the text.

    * ``title``, ``description``: what it is, and what is seen on it, in words.
    * ``svg``: the picture, one element that stands alone. It is readable on light and on dark screens.
    * ``text``: the same for a terminal, in ASCII.
    * ``boxes``: where words stand at most, in pixels: for tests.
    * ``width``: its width in pixels.

    >>> picture = paged.pictures.heads(AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8))
    >>> picture.svg.startswith("<svg"), picture.title
    (True, '4 query heads over 2 KV heads')
    """

    title: str
    description: str
    svg: str = dataclasses.field(repr=False)
    text: str = dataclasses.field(repr=False)
    boxes: tuple[Box, ...] = dataclasses.field(default=(), repr=False)
    width: int | float = 0.0

    @classmethod
    def of(cls, canvas: Canvas, title: str, description: str, text: str) -> "Picture":
        """What has been drawn on a canvas."""
        return cls(title, description, canvas.svg(title, description), text, tuple(canvas.boxes), canvas.width)

    def save(self, path: str | os.PathLike) -> None:
        """Write the SVG to a file."""
        pathlib.Path(path).write_text(self.svg + "\n", encoding="utf-8")

    def __str__(self) -> str:
        return f"{self.title}\n{self.text}"

    def _repr_html_(self) -> str:
        return self.svg


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root{{color-scheme:light dark}}
body{{margin:0 auto;max-width:800px;padding:16px;background:#fff;color:#1c2330;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}}
h1{{font-size:1.3em}}
pre,.scroll{{overflow-x:auto;margin:0 0 16px}}pre{{background:#f3f5f8;padding:12px;border-radius:6px;font-size:13px;
white-space:pre-wrap;overflow-wrap:anywhere}}
.scroll svg.pgd{{min-width:600px;max-width:none;width:100%}}
@media(prefers-color-scheme:dark){{body{{background:#15181e;color:#e8eaee}}pre{{background:#1f242c}}}}
</style>
</head>
<body>
<h1>{title}</h1>
"""


@dataclasses.dataclass(frozen=True)
class Page:
    """Several pictures on one page of HTML that stands alone, with words before them.

    * ``title``, ``words``: what the page is called, and the text that it begins with.
    * ``pictures``: the pictures, in order.

    >>> page = Page("Heads", "", (paged.pictures.heads(AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)),))
    >>> page.html.startswith("<!doctype html>"), page.html.count("<svg ")
    (True, 1)
    """

    title: str
    words: str
    pictures: tuple[Picture, ...]

    @property
    def html(self) -> str:
        """The page, which needs no other file."""
        parts = [_HEAD.format(title=html.escape(self.title))]
        if self.words:
            parts.append(f"<pre>{html.escape(self.words)}</pre>\n")
        for picture in self.pictures:
            parts.append(f'<div class="scroll" tabindex="0" role="group">{picture.svg}</div>\n')
        return "".join([*parts, "</body>\n</html>\n"])

    def save(self, path: str | os.PathLike) -> None:
        """Write the page to a file."""
        pathlib.Path(path).write_text(self.html, encoding="utf-8")

    def __str__(self) -> str:
        return "\n\n".join([*([self.words] if self.words else []), *map(str, self.pictures)])

    def _repr_html_(self) -> str:
        parts = [f"<pre>{html.escape(self.words)}</pre>"] if self.words else []
        return "\n".join([*parts, *(picture.svg for picture in self.pictures)])
