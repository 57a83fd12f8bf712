"""The `PartitionSpec` of each array: specs follow from the axes, and axes from given specs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from paged.spec import PageLayout, Pages

from .axes import Axes, joined, mesh_axes

_GIVEN = ("q", "k", "v", "pages", "batch", "sinks")


class ArraySpecs(NamedTuple):
    """How the arrays of an attention lie on a mesh: a `PartitionSpec` for each, or a `NamedSharding`.

    * ``q``, ``k``, ``v``, ``out``: for arrays [tokens, heads, dim].
    * ``pages``: a `Pages` that holds a spec in the place of each array.
    * ``batch``: one spec for all arrays of a batch.
    * ``sinks``: for [q_heads, ...].
    * ``lse``: for [tokens, heads].
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
        """The specs that follow from the axes. With ``has_copies`` KV heads are repeated, and every device receives all
        new keys and values."""
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
    """The axes that given specs imply.

    The queries' spec, or else the output's, has the axes of KV heads and of sequences. The pages' spec has the axes of
    sequences, then those of the context.
    """
    require_names(in_specs)
    q = in_specs.get("q", out_specs)
    pages = in_specs.get("pages")
    if q is None or pages is None:
        raise ValueError(
            'Without axes, in_specs must have "q", the PartitionSpec of [tokens, q_heads, head_dim], and "pages", the '
            f"one of the first array of pages; got {dict(in_specs)}."
        )
    rows, heads = (*q, None, None)[:2]
    shares_pages = mesh_axes((*pages, *[None] * 5)[layout.page_axis])
    own = mesh_axes(rows)
    if shares_pages[: len(own)] != own:
        raise ValueError(
            f"Each shard of sequences has its own pages, so the pages' axis in {pages} must begin with {own}, as the "
            f"rows of queries do in {q}."
        )
    return Axes(kv_heads=heads, sequences=rows, context=joined(shares_pages[len(own) :]))


def require_agreement(specs: ArraySpecs, in_specs: Mapping[str, P], out_specs: P | None) -> None:
    """``ValueError`` that names a given spec, if the spec does not follow from the axes."""
    require_names(in_specs)
    given = {f'in_specs["{name}"]': (name, spec) for name, spec in in_specs.items()}
    if out_specs is not None:
        given["out_specs"] = ("out", out_specs)
    for argument, (name, spec) in given.items():
        want = getattr(specs, name)
        want = want.arrays[0] if name == "pages" else want
        if entries_of(spec) != entries_of(want):
            raise ValueError(f"{argument} must be {want}, which follows from the axes; got {spec}.")


def require_names(in_specs: Mapping[str, P]) -> None:
    """``ValueError`` or ``TypeError`` unless ``in_specs`` maps names of arguments to a `PartitionSpec` each."""
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


def entries_of(spec: P) -> tuple[tuple[str, ...], ...]:
    """A spec's entries in one form, to compare: a tuple of mesh axes each, without empty ones at the end."""
    entries = [mesh_axes(entry) for entry in spec]
    while entries and not entries[-1]:
        entries.pop()
    return tuple(entries)
