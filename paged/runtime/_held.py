"""Which pages of a state belong to which group of a model's layers: how many there are, and of how many bytes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax

from paged.spec import Mask, PageLayout, Pages

from ._arguments import integer
from ._groups import Masks, keeps_all
from ._masks import caches_of
from .stacked_state import StackedState


class Held(NamedTuple):
    """The pages of one layer in a state, or of the like layers of a run.

    * ``masks``: of the attentions that read them; None where it is not known whose pages these are.
    * ``layout``, ``num_pages``: how they lie, and how many there are for each layer.
    * ``bytes_per_page``: of one page number in all of these layers, with per-token scales.
    """

    masks: tuple[Mask, ...] | None
    layout: PageLayout
    num_pages: int
    bytes_per_page: int


class GroupSizes(NamedTuple):
    """For each group of layers: how many pages its pool has, and the bytes of a page in all layers of the group."""

    page_size: int
    num_pages: tuple[int, ...]
    bytes_per_page: tuple[int, ...]


def group_sizes(
    model: Any,
    state: eqx.nn.State,
    groups: Sequence[Masks],
    num_pages: Any,
    page_size: Any,
    drafting: Sequence[tuple[Any, eqx.nn.State]] = (),
) -> GroupSizes:
    """The sizes of the pools of a model's groups.

    A pool has no more pages than any layer of its group: else writes would be dropped. Pages of an unknown layer count
    for every group.

    **Arguments:**

    - `model`, `state`: the pages are those of the state. Which layer's they are is known for every `PagedCache`.
    - `groups`: the masks of each group.
    - `num_pages`: the pages of a group that keeps every page, and the most of another one; None for as many as there
      are.
    - `page_size`: None for that of the state's pages.
    - `drafting`: other models that use the same pools, with their states.

    Raises ``ValueError`` where the state's pages are fewer, or of another size, and where it holds none and a size is
    None.
    """
    held = [x for pair in ((model, state), *drafting) for x in _held(*pair)]
    if not held and (num_pages is None or page_size is None):
        raise ValueError("The state holds no Pages that would say num_pages and page_size: pass both.")
    page_size = held[0].layout.page_size if page_size is None else integer("page_size", page_size, 1)
    asked = None if num_pages is None else integer("num_pages", num_pages, 1)
    of_group = [[x for x in held if x.masks is None or set(x.masks) & set(masks)] for masks in groups]
    most = max((min((x.num_pages for x in own), default=0) for own in of_group), default=0)
    for masks, own in zip(groups, of_group, strict=True):
        for x in own:
            is_short = asked is not None and x.num_pages < asked and (keeps_all(masks) or most < asked)
            if x.layout.page_size != page_size or is_short:
                raise ValueError(
                    f"The pool has num_pages={asked or x.num_pages} of page_size={page_size} tokens, which every "
                    f"layer's pages must hold; the state has a layer with {x.num_pages} pages of {x.layout.page_size}."
                )
    limit = [] if asked is None else [asked]
    sizes = [min([x.num_pages for x in own] + limit) for own in of_group]
    bytes_per_page = [sum(x.bytes_per_page for x in own if x.masks is not None or len(groups) == 1) for own in of_group]
    return GroupSizes(page_size, tuple(sizes), tuple(bytes_per_page))


def _held(model: Any, state: eqx.nn.State) -> Iterable[Held]:
    """Each layer's pages in a state, once."""
    masks_by_value: dict[int, dict[Mask, None]] = {}
    for cache in caches_of(model):
        try:
            value = state.get(cache.index)
        except KeyError:  # a layer of another state
            continue
        masks_by_value.setdefault(id(value), {})[cache.attend.spec.visibility] = None
    is_value = lambda x: isinstance(x, Pages | StackedState) or id(x) in masks_by_value
    for value in jax.tree.leaves(state, is_leaf=is_value):
        masks = tuple(masks_by_value[id(value)]) if id(value) in masks_by_value else None
        layers = value.num_layers if isinstance(value, StackedState) else 1
        for pages in jax.tree.leaves(value, is_leaf=_is_pages):
            if _is_pages(pages):
                size = _token_scale_bytes(pages.layout) + pages.layout.bytes_per_page
                yield Held(masks, pages.layout, pages.num_pages // layers, layers * size)


def _token_scale_bytes(layout: PageLayout) -> int:
    return 8 * math.prod(layout.scale_shape(1) or ()) if layout.scales == "token" else 0


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages)
