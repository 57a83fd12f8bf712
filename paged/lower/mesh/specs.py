"""Which `PartitionSpec` each array has: they follow from the axes, and the axes from them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from paged.spec import PageLayout, Pages

from .axes import Axes, joined, names_of

_GIVEN = ("q", "k", "v", "pages", "batch", "sinks")


class ArraySpecs(NamedTuple):
    """How arrays lie on a mesh: of each a `PartitionSpec`, or in `ShardedAttend.shardings` a `NamedSharding`.

    ``q``, ``k``, ``v`` and ``out`` are of [tokens, heads, dim], ``lse`` of [tokens, heads], ``sinks`` of [q_heads].
    ``pages`` is of `Pages`, an entry for each of its arrays; ``batch`` is one for all arrays of a batch.
    """

    q: Any
    k: Any
    v: Any
    pages: Any
    batch: Any
    sinks: Any
    out: Any
    lse: Any

    @classmethod
    def of(cls, axes: Axes, layout: PageLayout, has_copies: bool = False) -> "ArraySpecs":
        """Those that the axes ask for. New keys and values are whole on each device where KV heads are repeated."""
        rows, heads = axes.sequences, axes.kv_heads
        queries, new = P(rows, heads, None), P(rows, None if has_copies else heads, None)
        return cls(
            queries,
            new,
            new,
            _pages(axes, layout),
            P() if rows is None else P(rows),
            P(heads),
            out=P(rows, heads, None),
            lse=P(rows, heads),
        )


def axes_of(in_specs: Mapping[str, P], out_specs: P | None, layout: PageLayout) -> Axes:
    """The axes that given specs imply: KV heads and sequences as queries have them, or else the output; and the
    context, which the pages have besides the sequences."""
    require_names(in_specs)
    q = in_specs.get("q", out_specs)
    pages = in_specs.get("pages")
    if q is None or pages is None:
        raise ValueError(
            'Without axes, in_specs must have "q", a PartitionSpec of [tokens, q_heads, head_dim], and "pages", that '
            f"of their first array; got {dict(in_specs)}."
        )
    rows, heads = (*q, None, None)[:2]
    shares_pages = names_of((*pages, *[None] * 5)[layout.page_axis])
    own = names_of(rows)
    if shares_pages[: len(own)] != own:
        raise ValueError(
            f"Each shard of sequences has its own pages, so the pages' axis in {pages} must begin with {own}, as the "
            f"rows of queries do in {q}."
        )
    return Axes(kv_heads=heads, sequences=rows, context=joined(shares_pages[len(own) :]))


def require_agreement(specs: ArraySpecs, in_specs: Mapping[str, P], out_specs: P | None) -> None:
    """``ValueError`` where a given spec is not the one that the axes ask for, naming it."""
    require_names(in_specs)
    given = {f'in_specs["{name}"]': (name, spec) for name, spec in in_specs.items()}
    if out_specs is not None:
        given["out_specs"] = ("out", out_specs)
    for said, (name, spec) in given.items():
        want = getattr(specs, name)
        want = want.arrays[0] if name == "pages" else want
        if _entries(spec) != _entries(want):
            raise ValueError(f"{said} must be {want}, as the axes ask; got {spec}.")


def require_names(in_specs: Mapping[str, P]) -> None:
    """``ValueError`` or ``TypeError`` unless ``in_specs`` gives a `PartitionSpec` to arguments that there are."""
    if not isinstance(in_specs, Mapping) or not all(isinstance(spec, P) for spec in in_specs.values()):
        raise TypeError(f"in_specs must give names a PartitionSpec each, such as {{'q': P()}}; got {in_specs!r}.")
    unknown = [name for name in in_specs if name not in _GIVEN]
    if unknown:
        raise ValueError(f"in_specs must be of {_GIVEN}; got {unknown}.")


def _pages(axes: Axes, layout: PageLayout) -> Pages:
    shared = {"page": axes.pages, "head": axes.kv_heads, "kv_head": axes.kv_heads}

    def spec_of(names: tuple[str, ...]) -> P:
        last = max((i for i, name in enumerate(names) if name in shared), default=-1)
        return P(*(shared.get(name) for name in names[: last + 1]))

    arrays: Any = tuple(map(spec_of, layout.array_axes))
    scale: Any = None if layout.scale_axes is None else spec_of(layout.scale_axes)
    return Pages(arrays, scale, scale, layout)


def _entries(spec: P) -> tuple[tuple[str, ...], ...]:
    """A spec's entries, in one form."""
    entries = [names_of(entry) for entry in spec]
    while entries and not entries[-1]:
        entries.pop()
    return tuple(entries)
