"""Links of the site that `make docs` builds: between pages in and outside of `docs`, and of what was built.

A link such as ``../benchmarks/gpu/README.md`` works on GitHub, where pages lie in the repository. The site has the same
file at ``benchmarks/gpu/README.md``. Files of other kinds that a page links are copied.
"""

import html.parser
import pathlib
import posixpath
import re
import urllib.parse

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("README.md")),
)
_NAMED_BY_FILE = re.compile(r"\[([\w./-]+\.md)\]\(([^)#\s]+\.md)(#[^)\s]+)?\)")
_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def place_on_site(path: str) -> str:
    """Where a file of the repository lies on the site, both from their roots. A notebook is a page there."""
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def place_in_repository(path: str) -> str:
    """Where a page of the site lies in the repository."""
    return path if path in OUTSIDE else f"docs/{path}"


def rewritten(markdown: str, page: str) -> str:
    """The text of a page, with links between files of the repository as links between pages of the site."""
    here = posixpath.dirname(place_in_repository(page))

    def named(match: re.Match) -> str:
        """On the site a page is called by its title, and not by its file."""
        first = (ROOT / here / match[2]).read_text().partition("\n")[0]
        return f"[{first.removeprefix('# ')}]({match[2]}{match[3] or ''})"

    def link(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        return match[1] + posixpath.relpath(place_on_site(target), posixpath.dirname(page) or ".")

    # In a table, GitHub wants `a \\| b` for the code `a | b`. The site would show the backslash.
    plain = _ROW.sub(lambda match: match[0].replace("\\|", "|"), markdown)
    return _LINK.sub(link, _NAMED_BY_FILE.sub(named, plain))


def linked_files() -> set[str]:
    """Files outside of `docs` that pages link and that are no pages of the site."""
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / path for path in OUTSIDE)]
    found = set()
    for page in pages:
        here = page.relative_to(ROOT).parent.as_posix()
        for _, link in _LINK.findall(page.read_text()):
            target = posixpath.normpath(posixpath.join(here, link))
            if not target.startswith("docs/") and target not in OUTSIDE and (ROOT / target).is_file():
                found.add(target)
    return found


class _Links(html.parser.HTMLParser):
    """The links of a page, and the places in it that a link may name."""

    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.add(value)
            if value and name in ("id", "name"):
                self.places.add(value)


def dead_links(site: pathlib.Path) -> list[str]:
    """Every link, picture, script and style of a built site that leads nowhere in it; other sites are not asked."""
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    dead = []
    for page, found in pages.items():
        for link in sorted(found.links):
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            place = urllib.parse.unquote(url.fragment)
            if not target.exists() or (place and target in pages and place not in pages[target].places):
                dead.append(f"{page.relative_to(site)}: {link}")
    return dead
