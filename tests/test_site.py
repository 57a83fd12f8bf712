"""The documentation as a site: what is generated is not stale, and every page has a place and says whom it is for."""

import ast
import functools
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest

import paged
from examples import masks, notebooks, site_api, site_links, support
from paged.spec import terms_in

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGE = support.PAGE.read_text()


def test_every_page_is_in_the_navigation_and_says_first_whom_it_is_for():
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.name for page in DOCS} <= listed
    assert set(site_links.OUTSIDE) <= listed
    for page in (*DOCS, *(ROOT / path for path in site_links.OUTSIDE)):
        title, first, *_ = page.read_text().split("\n\n")
        assert title.startswith("# ") and re.match(r"For whom? ", first), f"{page.name} does not say whom it is for"


@pytest.mark.parametrize(
    "page, link, on_site",
    [
        ("gpu.md", "../benchmarks/gpu/README.md", "benchmarks/gpu/README.md"),
        ("gpu.md", "tpu.md#here", "tpu.md#here"),
        ("CHANGELOG.md", "docs/gpu.md", "gpu.md"),
        ("benchmarks/gpu/README.md", "../../docs/gpu.md", "../../gpu.md"),
        ("benchmarks/tpu/static/README.md", "../../tpu_decode/README.md", "../../tpu_decode/README.md"),
        ("gpu.md", "https://example.com/x.md", "https://example.com/x.md"),
    ],
)
def test_a_link_of_the_repository_becomes_a_link_of_the_site(page, link, on_site):
    assert site_links.rewritten(f"See [that]({link}).", page) == f"See [that]({on_site})."


def test_on_the_site_a_page_is_called_by_its_title():
    assert site_links.rewritten("[gpu.md](gpu.md)", "README.md") == "[Attention on GPUs](gpu.md)"
    assert site_links.rewritten("[gpu.md](gpu.md#here)", "README.md") == "[Attention on GPUs](gpu.md#here)"


def test_code_in_a_table_has_no_backslash_on_the_site():
    assert site_links.rewritten("| `a \\| b` |\n`c \\| d`", "gpu.md") == "| `a | b` |\n`c \\| d`"


@functools.cache
def _tables_with_words():
    """Constants that a line of words follows, which the reference shows."""
    found = set()
    for path in (ROOT / "paged").rglob("*.py"):
        for one, following in itertools.pairwise(ast.parse(path.read_text()).body):
            if isinstance(one, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
                targets = one.targets if isinstance(one, ast.Assign) else [one.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _places(page):
    """Places of a page that a link may name: its headings, as the site and GitHub name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_to_a_place_of_a_page_lead_to_a_heading():
    found, dead = 0, []
    for page in (ROOT / "README.md", *DOCS, *(ROOT / path for path in site_links.OUTSIDE)):
        for path, place in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text()):
            target = page.parent / path if path else page
            if target.suffix == ".md":
                found += 1
                dead += [f"{page.relative_to(ROOT)}: {path}#{place}"] if place not in _places(target) else []
    assert found > 20 and not dead


@pytest.mark.parametrize("package", site_api.PACKAGES)
def test_the_reference_has_every_public_name_once(package):
    module = paged if package == "paged" else getattr(paged, package)
    named = site_api.names_of(package)
    tables = {name for name in vars(module) if name.isupper() and name[0] != "_"} - {"TYPE_CHECKING"}
    assert tables <= set(named) and tables <= _tables_with_words()
    public = {name for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    own = {name for name in public if getattr(vars(module)[name], "__module__", "").startswith("paged")}
    assert own and own <= set(named)
    pages = [page for page, about in site_api.API.items() if about.package == package]
    assert sorted(name for page in pages for name in site_api.names_on(page)) == sorted(named)


def test_a_dead_link_of_the_site_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there"></a><a href="b.html#gone"></a><img src="no.svg">')
    (tmp_path / "b.html").write_text('<h1 id="there"></h1><a href="https://example.com"></a><a href="./"></a>')
    (tmp_path / "index.html").write_text("")
    assert site_links.dead_links(tmp_path) == ["a.html: b.html#gone", "a.html: no.svg"]


def test_the_gallery_shows_every_mask():
    shown = {type(term) for entry in masks.GALLERY for term in terms_in(entry.spec.visibility)}
    public = {value for value in vars(paged).values() if isinstance(value, type) and issubclass(value, paged.Mask)}
    assert public - {paged.Mask} <= shown


def test_the_gallery_of_masks_is_not_stale():
    assert masks.PAGE.read_text() == masks.page(), "docs/masks.md is stale: run `make pictures`"
    assert {f"{entry.name}.svg" for entry in masks.GALLERY} == {path.name for path in masks.FOLDER.iterdir()}


def test_the_pictures_of_the_gallery_are_not_stale():
    for entry in masks.GALLERY:
        shown = (masks.FOLDER / f"{entry.name}.svg").read_text()
        assert shown == masks.drawn(entry).svg + "\n", f"{entry.name}.svg is stale: run `make pictures`"


def _columns(section):
    """The first chip of each column of a section of the page, with the column's name."""
    names = {column for title, _, column in support.read(PAGE) if title == section}
    by_lowering = {name: [way for way in support.ways() if way.lowering.name == name.split(":")[0]] for name in names}
    return [
        (name, way)
        for name, ways in sorted(by_lowering.items())
        for way in ways
        if way.chip is None or way.chip in name.split(": ")[1].split(", ")
    ]


def _require_as_shown(shown, reason, where):
    if reason is None:
        assert shown.answer in ("yes", "some"), f"{where} runs; run `make support`"
    else:
        assert reason in shown.reasons and shown.answer != "yes", f"{where} is refused: {reason}; run `make support`"


def _is_asked(way):
    return support.IS_WHOLE or way.lowering.name != "gpu-decode"


def test_every_chip_of_every_lowering_has_a_column():
    shown = [way for _, way in _columns("Terms of a spec")]
    assert sorted(shown, key=str) == sorted(support.ways(), key=str)


def test_the_support_matrix_is_what_the_lowerings_say_of_terms():
    """One page order and dtype, the first chip of each column; `test_the_support_matrix_is_not_stale` asks all."""
    cells, seen = support.read(PAGE), set()
    assert {row for title, row, _ in cells if title == "Terms of a spec"} == set(support.TERMS)
    for column, way in _columns("Terms of a spec"):
        if not _is_asked(way) or column in seen:
            continue
        seen.add(column)
        for term, phase in itertools.product(support.TERMS, ("decode", "mixed")):
            reason = support.refusal(way, phase, term, "packed", "bfloat16", None, 128)
            _require_as_shown(cells["Terms of a spec", term, column][phase], reason, f"{term} {phase} {column}")


def test_the_support_matrix_is_what_the_lowerings_say_of_pages():
    section, cells, seen = "Pages, head_dim 64", support.read(PAGE), set()
    rows = {row for title, row, _ in cells if title == section}
    for column, way in _columns(section):
        if not _is_asked(way) or column in seen:
            continue
        seen.add(column)
        for order, (dtype, scales) in itertools.product(support.ORDERS, support.DTYPES):
            mine = rf"{order} \| (?:.*; )?{dtype}" + (rf": (?:\w+, )*{scales}\b.*" if scales else r"(?:;.*)?")
            (row,) = (row for row in rows if re.fullmatch(mine, row))
            reason = support.refusal(way, "decode", support.PLAIN, order, dtype, scales, 64)
            _require_as_shown(cells[section, row, column]["decode"], reason, f"{row} {column}")


@pytest.mark.slow
@pytest.mark.skipif(not support.IS_WHOLE, reason="the page is written with JAX 0.11, which the GPU kernel needs")
def test_the_support_matrix_is_not_stale():
    assert support.page() == PAGE, "docs/support.md is stale: run `make support`"


def test_every_notebook_is_in_the_navigation_and_shows_what_it_prints_and_draws():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert notebooks.PATHS
    for path in notebooks.PATHS:
        assert f"notebooks/{path.stem}.md" in navigation
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        tells = re.compile(r"^ *print\(|^paged\.pictures\.", re.MULTILINE)
        assert [bool(cell["outputs"]) for cell in code] == [
            bool(tells.search("".join(cell["source"]))) for cell in code
        ]
        page = notebooks.page(path)
        assert re.match(r"# .*\n\nFor whom? ", page), path.name
        assert all(f"]({name})" in page for name in notebooks.pictures_of(path))


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks.PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_and_what_it_shows_is_not_stale(path):
    assert notebooks.ran(path) == json.loads(path.read_text()), f"{path.name} is stale: run `make pictures`"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason='the site needs pip install "paged[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in site_api.API:
        html = (tmp_path / "api" / f"{page}.html").read_text()
        names = set(re.findall(r'<h2 id="paged\.([\w.]+)"', html))
        assert {name.rpartition(".")[2] for name in names} == set(site_api.names_on(page))
