"""`Explanation.show` and `python -m paged explain`: a page that stands alone, whose counts are those of `explain`."""

import html.parser
import re

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged import command
from tests.pictures.drawn import require_sound

VOID = {"meta", "br"}


class _Tags(html.parser.HTMLParser):
    """Every tag that opens closes, and nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in VOID else [tag]
        names = [value for name, value in attributes if name in ("src", "href")]
        self.outside += [tag, *names] if names or tag in ("script", "link", "img", "iframe") else []

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _require_alone(text):
    tags = _Tags()
    tags.feed(text)
    assert not tags.open and not tags.outside and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    ids = re.findall(r' id="([^"]+)"', text)
    assert ids and len(ids) == len(set(ids))


def test_an_explanation_is_shown_on_one_page_that_stands_alone(tmp_path):
    spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=paged.Value("window"), sinks=True)
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    attend, path = paged.lower(spec, layout, target="xla"), tmp_path / "page.html"
    batch = paged.RaggedBatch.decode([19, 7, 0], np.arange(15).reshape(3, 5), values={"window": np.array([6, 9, 1])})
    explanation = attend.explain(jnp.ones((3, 4, 8)), layout.init(16), batch)
    page = explanation.show(path)
    assert path.read_text() == page.html and str(explanation) in str(page)
    _require_alone(page.html)
    assert [picture.title.split(",")[0] for picture in page.pictures] == [
        "4 query heads over 2 KV heads",
        "What a query sees",
        "The pages of all sequences",
        "The pages of sequence 0",
        "How xla-blocks(pages_per_block=32",
    ]
    assert page.pictures[2].description.startswith(f"{explanation.pages_visited} pages visited")
    assert page._repr_html_().count('class="pgd"') == len(page.pictures) and page.pictures[0]._repr_html_() in page.html
    for picture in page.pictures:
        require_sound(picture)
        assert picture.title in str(page)


@pytest.mark.kernels
def test_the_command_prints_and_writes_what_explain_says(tmp_path, capsys):
    tiny = ["explain", "--heads=4/2", "--head-dim=16", "--window=20", "--page-size=8", "--dtype=float32"]
    assert command.main([*tiny, "--lengths=40,9", "--target=xla"]) == 0
    printed = capsys.readouterr().out
    assert "visits 5 pages" in printed and "5 pages visited, 2 skipped, 0 freed, 0 shared, 0 of 7 free" in printed
    assert printed.isascii() and "4 query heads over 2 KV heads (2 to each)" in printed
    path = tmp_path / "page.html"
    assert command.main([*tiny, "--lengths=40,9", "--target=xla", "--prefix=8", "--pages=9", f"--html={path}"]) == 0
    printed = capsys.readouterr().out  # the first page of each sequence is seen too
    assert f"written to {path}" in printed and "visits 6 pages" in printed
    _require_alone(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths=4", "--rows=5"], "at most the length"),
        (["--lengths=4,5", "--rows=1,2,3"], "one number for each"),
        (["--lengths=100", "--pages=3"], "at least 7"),
        (["--chip=v5e", "--target=xla"], "is for --target tpu"),
        (["--heads=3/2"], "multiple of num_kv_heads"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_sentence(arguments, words, capsys):
    assert command.main(["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("python -m paged explain: ")
