"""Hooks of mkdocs for `make docs`: pages outside of `docs` become pages of the site, and an API reference is listed.

A link such as ``../benchmarks/gpu/README.md`` works on GitHub, where pages lie in the repository. The site has the same
file at ``benchmarks/gpu/README.md``. Files of other kinds that a page links are copied.
"""

import ast
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("README.md")),
)
API = {
    "paged": "For who writes attention: specs, masks, layouts, batches, `lower`, and what explains and tunes.",
    "runtime": "For who writes and serves models: layers, pools of pages, caches, sampling, `generate` and engines.",
    "models": "For who serves released checkpoints.",
    "testing": "For who proves a mask, a kernel, a layer or a pool of pages.",
    "pictures": "For who draws what an attention or an engine did.",
}
_LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")


def names_of(package: str) -> list[str]:
    """What a package exports: the names that its `__init__.py` imports as themselves, classes and functions alike."""
    folder = ROOT / "paged" / ("" if package == "paged" else package)
    tree = ast.parse((folder / "__init__.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {(alias.name, node.module) for node in imported for alias in node.names if alias.asname == alias.name}
    # Names that a package takes from its own folder; a module that is exported has no module that it comes from.
    return sorted({name for name, module in names if module and not name.isupper()}, key=str.lower)


def api_page(package: str) -> str:
    """A page with a directive of mkdocstrings for each name of a package."""
    module = "paged" if package == "paged" else f"paged.{package}"
    parts = [f"# {module}\n\n{API[package]}\n"]
    parts += [f"::: {module}.{name}\n    options:\n      heading_level: 2\n" for name in names_of(package)]
    return "\n".join(parts)


def place_on_site(path: str) -> str:
    """Where a file of the repository lies on the site, both from their roots."""
    return path.removeprefix("docs/")


def place_in_repository(path: str) -> str:
    """Where a page of the site lies in the repository."""
    return path if path in OUTSIDE else f"docs/{path}"


def rewritten(markdown: str, page: str) -> str:
    """The text of a page, with links between files of the repository as links between pages of the site."""
    here = posixpath.dirname(place_in_repository(page))

    def link(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        return match[1] + posixpath.relpath(place_on_site(target), posixpath.dirname(page) or ".")

    return _LINK.sub(link, markdown)


def _linked_files() -> set[str]:
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


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages that do not lie in `docs`."""
    for path in (*OUTSIDE, *sorted(_linked_files())):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for package in API:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the site's own pages."""
    return markdown if page.file.src_uri.startswith("api/") else rewritten(markdown, page.file.src_uri)
