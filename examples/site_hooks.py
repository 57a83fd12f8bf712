"""Hooks of mkdocs for `make docs`: pages outside of `docs` become pages of the site, and so does an API reference."""

import pathlib
from typing import Any

from mkdocs.exceptions import PluginError  # pyright: ignore[reportMissingImports]
from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

from examples import notebooks
from examples.site_api import API, api_page
from examples.site_links import OUTSIDE, ROOT, dead_links, linked_files, rewritten

WIDE = ("support.md",)  # pages whose tables have more columns than fit beside a table of contents


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages that do not lie in `docs`."""
    for path in (*OUTSIDE, *sorted(linked_files())):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in notebooks.PATHS:
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebooks.page(path)))
        for name, svg in notebooks.pictures_of(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=svg))
    for page in API:
        files.append(File.generated(config, f"api/{page}.md", content=api_page(page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the site's own pages, and give wide tables the place of the table of contents."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return markdown if page.file.src_uri.startswith("api/") else rewritten(markdown, page.file.src_uri)


def on_post_build(config: Any, **_: Any) -> None:
    """Fail on a dead link in what was built, docstrings and the theme included."""
    dead = dead_links(pathlib.Path(config["site_dir"]).resolve())
    if dead:
        raise PluginError(f"{len(dead)} dead links: " + "; ".join(dead[:20]))
