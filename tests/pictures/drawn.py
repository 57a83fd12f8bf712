"""Reading pictures back: which tiles an SVG draws, and where its words stand."""

import itertools
import re
import xml.etree.ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"


def tiles(svg, letter):
    """For each matrix of tiles in a picture the set of ``(row, column)`` that are drawn in the state ``letter``."""
    found = []
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if path.get("class") == f"s{letter}":
            found.append(set(_cells(path.get("d", ""))))
    return found


def _cells(d):
    row = column = 0
    for kind, numbers in re.findall(r"([Mmh])([-\d. ]+)", d):
        x, *y = map(int, numbers.split())
        if kind == "h":
            yield from ((row, column + i) for i in range(x))
            column += x
        else:
            column, row = (x, y[0]) if kind == "M" else (column + x, row)


def require_sound(picture):
    """The picture is well-formed, names itself, has words that neither overlap nor are cut, and repeats no id."""
    root = ET.fromstring(picture.svg)
    width, height = (float(root.get(name, "0")) for name in ("width", "height"))
    assert root.get("role") == "img"
    names = [root.find(f"{SVG}{name}") for name in ("title", "desc")]
    assert [name.get("id") for name in names] == root.get("aria-labelledby", "").split()
    assert [name.text for name in names] == [picture.title, picture.description] and picture.description
    assert "prefers-color-scheme:dark" in picture.svg
    ids = re.findall(r' id="([^"]+)"', picture.svg)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", picture.svg)) <= set(ids)
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert texts == [box.words for box in picture.boxes]
    for box in picture.boxes:
        inside = box.x >= 0 and box.y >= 0 and box.x + box.width <= width and box.y + box.height <= height
        assert inside, f"{box} is cut at {width} x {height}"
    for one, other in itertools.combinations(picture.boxes, 2):
        is_apart = (
            one.x + one.width <= other.x
            or other.x + other.width <= one.x
            or one.y + one.height <= other.y
            or other.y + other.height <= one.y
        )
        assert is_apart, f"{one} overlaps {other}"
    assert picture.text.isascii() and max(map(len, picture.text.splitlines())) <= 120
