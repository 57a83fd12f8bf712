"""The gallery of masks: `docs/masks.md` and its pictures, which `make pictures` writes from one table."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

import paged
from paged import pictures
from paged.lower import pages_seen

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGE, FOLDER = DOCS / "masks.md", DOCS / "pictures" / "masks"
LENGTH, PAGE_SIZE = 64, 4


class Entry(NamedTuple):
    """A mask of the gallery: its code, what it is for, and where it comes from."""

    name: str
    title: str
    code: str
    use: str
    source: str

    @property
    def spec(self) -> paged.AttentionSpec:
        """The attention that the code makes."""
        return self.names["spec"]

    @property
    def drafts(self) -> paged.tree.Drafts | None:
        """The tree of drafts that the code makes, if it makes one."""
        return self.names.get("drafts")

    @property
    def names(self) -> dict[str, Any]:
        """What the code has named when it has run."""
        names: dict[str, Any] = {"paged": paged, "plain": PLAIN}
        exec(self.code, names)
        return names


PLAIN = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64)
_PAPER = "https://arxiv.org/abs/"

GALLERY = (
    Entry(
        "causal",
        "Causal",
        "spec = plain",
        "A token sees itself and the past. Every model that generates text attends this way in some layer.",
        f"Vaswani et al. 2017, [Attention Is All You Need]({_PAPER}1706.03762)",
    ),
    Entry(
        "everything",
        "Everything",
        "spec = plain.replace(causal=False)",
        "Every token sees every token, as in an encoder. The whole sequence must be one step.",
        f"Devlin et al. 2018, [BERT]({_PAPER}1810.04805)",
    ),
    Entry(
        "window",
        "A sliding window",
        "spec = plain.replace(window=16)",
        "A token sees the last 16 tokens, its own included. Pages before the window are not read, and can be freed.",
        f"Beltagy et al. 2020, [Longformer]({_PAPER}2004.05150); Jiang et al. 2023, [Mistral 7B]({_PAPER}2310.06825)",
    ),
    Entry(
        "first_tokens",
        "A window and the first tokens",
        "spec = plain.replace(mask=paged.Window(16) | paged.Prefix(4))",
        "Softmax gives much weight to the first tokens, which a window would lose. The middle is not read.",
        f"Xiao et al. 2023, [Efficient Streaming Language Models with Attention Sinks]({_PAPER}2309.17453)",
    ),
    Entry(
        "prefix",
        "A prefix",
        "spec = plain.replace(causal=False, mask=paged.Causal() | paged.Prefix(24))",
        "The tokens of the prompt see each other in both directions, and the answer is causal. The prefix must be one "
        "step.",
        f"Raffel et al. 2019, [T5]({_PAPER}1910.10683), section 3.2.1",
    ),
    Entry(
        "chunk",
        "Chunks",
        "spec = plain.replace(mask=paged.Chunk(16))",
        "A token sees the past of its own chunk. The local layers of Llama 4 attend this way.",
        "Meta 2025, Llama 4; no paper describes it",
    ),
    Entry(
        "blocks",
        "Causal by blocks",
        "spec = plain.replace(causal=False, mask=paged.Causal() | paged.Chunk(16))",
        "A token sees its whole block, and all blocks before. Block diffusion denoises one block after another.",
        f"Arriola et al. 2025, [Block Diffusion]({_PAPER}2503.09573)",
    ),
    Entry(
        "documents",
        "Packed documents",
        "spec = plain.replace(mask=paged.Segments((12, 40)))",
        "Three documents in one sequence do not see each other. The second and the third start at tokens 12 and 40.",
        f"Krell et al. 2021, [Efficient Sequence Packing without Cross-contamination]({_PAPER}2107.02027)",
    ),
    Entry(
        "images",
        "Images in text",
        "spec = plain.replace(causal=False, mask=paged.Causal() | paged.Spans((8, 40), (24, 52)))",
        "Text is causal. The tokens of one image, here 8 to 23 and 40 to 51, see each other in both directions.",
        f"Zhou et al. 2024, [Transfusion]({_PAPER}2408.11039)",
    ),
    Entry(
        "strided",
        "A stride",
        "spec = plain.replace(mask=paged.Window(8) | paged.Where(lambda p, j: (p - j) % 8 == 0))",
        "A token sees the last 8, and every 8th before. No page is skipped: any page may hold an 8th token. "
        "A mask of your own may know more; see [a first hour](start.md).",
        f"Child et al. 2019, [Generating Long Sequences with Sparse Transformers]({_PAPER}1904.10509)",
    ),
    Entry(
        "by_head",
        "One mask for some heads, another for others",
        "streaming = paged.Window(16) | paged.Prefix(4)\n"
        "spec = plain.replace(mask=paged.PerHead((paged.Everything(), streaming)))",
        "The first two query heads see all of the past, the other two a window and the first tokens. A page is visited "
        "where some head sees it.",
        f"Xiao et al. 2024, [DuoAttention]({_PAPER}2410.10819)",
    ),
    Entry(
        "pruned",
        "Heads that see nothing",
        "spec = plain.replace(mask=paged.PerHead((paged.Everything(), paged.Nothing())))",
        "The last two query heads are pruned: they see no token, and their output is 0.",
        f"Michel et al. 2019, [Are Sixteen Heads Really Better than One?]({_PAPER}1905.10650)",
    ),
    Entry(
        "tree",
        "A tree of drafts",
        "drafts = paged.tree.from_topk((3, 2, 1))\nspec = plain.replace(mask=paged.Window(40) & paged.Tree())",
        "Speculative decoding scores 16 rows in one step: the last token, 3 drafts after it, 2 after each of these, "
        "and one more after each of those. A row sees its ancestors, and of the tokens before the tree what the window "
        "shows. Such a step [brings its tree](requests.md#a-tree-of-drafts).",
        f"Miao et al. 2023, [SpecInfer]({_PAPER}2305.09781)",
    ),
)


def visited(entry: Entry) -> tuple[int, int]:
    """How many pages the last step visits, and how many the sequence has: a step of one token, or of a tree."""
    count, rows = LENGTH // PAGE_SIZE, 1
    lengths, tables = [LENGTH], np.arange(count)[None]
    batch = paged.RaggedBatch.decode(lengths, tables)
    if entry.drafts is not None:
        batch, rows = paged.tree.batch(lengths, tables, entry.drafts), len(entry.drafts.parents)
    program = paged.Program.from_spec(entry.spec).for_batch(batch)
    seen = pages_seen(program, batch, tokens=rows, page_size=PAGE_SIZE, num_pages=count)
    return int(seen.some.sum()), count


def drawn(entry: Entry) -> pictures.Picture:
    """The picture of a mask."""
    rows = LENGTH if entry.drafts is None else len(entry.drafts.parents)
    size = PAGE_SIZE
    return pictures.mask(entry.spec, rows, LENGTH, page_size=size, rows_per_tile=size, drafts=entry.drafts)


def page() -> str:
    """The text of `docs/masks.md`."""
    parts = [_HEAD]
    for entry in GALLERY:
        some, count = visited(entry)
        step = f"decode token {LENGTH - 1}" if entry.drafts is None else f"score {len(entry.drafts.parents)} rows"
        alt = f"{entry.title}: the pairs that are visible, and the tiles that are full, partial and skipped"
        parts.append(
            f"## {entry.title}\n\n```python\n{entry.code}\n```\n\n{entry.use}\n\n"
            f"![{alt}](pictures/masks/{entry.name}.svg)\n\n"
            f"Pages visited to {step}: {some} of {count}. Source: {entry.source}.\n"
        )
    return "\n".join([*parts, _TAIL])


_HEAD = f"""# A gallery of masks

For who looks for the mask of a model or a paper, or for a starting point of one of his own. This page and its pictures
are generated by `make pictures`.

Each picture has the visible pairs of {LENGTH} queries and {LENGTH} keys on the left. On the right it has what a
lowering knows of each tile before it looks: full, partial, or empty, which is skipped. Tiles have {PAGE_SIZE} queries
and one page of {PAGE_SIZE} keys. Of a tree its own rows are drawn.

```python
import paged

plain = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64)
```
"""

_TAIL = """## And more

- Every number above may [come with requests](requests.md): a window, a prefix, where documents start.
- Masks combine by `&`, `|` and `~`. [A first hour](start.md) makes, draws and proves a new one.
- [What runs where](support.md) says which lowering accepts which mask.
"""


def main() -> None:
    """Draw and write everything."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for entry in GALLERY:
        drawn(entry).save(FOLDER / f"{entry.name}.svg")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(GALLERY)} masks")


if __name__ == "__main__":
    main()
