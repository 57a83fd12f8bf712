"""`GroupedBatch`: one step of a model whose layers keep different pages, with a table for each group of layers."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Int

from .attention import AttentionSpec
from .batch import RaggedBatch
from .mask import Mask
from .masks import Everything

# What each group has for itself; everything else of a step is the same for all groups.
_OWN = ("block_tables", "copy_from")


class GroupedBatch(eqx.Module):
    """One step, with a block table for each group of layers.

    Layers with a window need fewer pages than layers without one. So a model's layers form *groups*: the masks of a
    group keep the same pages, and its layers share a block table. A model is called with this batch as with a
    `RaggedBatch`. Every `PagedAttention`, `PagedCache` and lowered attention uses the table of its own spec, and so do
    `paged.check`, `Attend.plan` and a `LayerStack`. `GroupedPool` makes such batches.

    The batch is a pytree, and goes through ``jit`` and ``scan``. What is the same for all groups is held once:
    ``lengths``, ``query_starts``, ``num_seqs``, ``values``, ``positions`` and ``ancestors`` are those of `RaggedBatch`.

    **Arguments:**

    - `batches`: the step of each group: at least one, equal but for their tables. The tables have one shape.
    - `masks`: for each group the masks of its attentions, each as ``spec.visibility``. A group with `Everything` among
      its masks keeps every page, and serves any mask that no group has.

    **Raises:** ``ValueError`` unless there are as many groups of masks as batches, for a mask in two groups, and for
    batches of different shapes.

    >>> local, full = Causal() & Window(4), Causal()
    >>> batches = [RaggedBatch.decode(lengths=[9], block_tables=[table]) for table in ([-1, 3, 1], [4, 0, 2])]
    >>> batch = GroupedBatch(batches, [[local], [full, Everything()]])
    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, window=4)
    >>> batch.for_spec(spec).block_tables.tolist(), batch.lengths.tolist()
    ([[-1, 3, 1]], [9])
    """

    common: RaggedBatch  # with what the first group has for itself
    own: tuple[dict[str, Any], ...]  # what each other group has for itself
    checked_for: tuple[Any, ...] = eqx.field(static=True)  # of each other group
    masks: tuple[tuple[Mask, ...], ...] = eqx.field(static=True)

    def __init__(self, batches: Iterable[RaggedBatch], masks: Iterable[Iterable[Mask]]):
        first, *others = batches
        self.common = first
        self.own = tuple(map(_own, others))
        self.checked_for = tuple(batch.checked_for for batch in others)
        self.masks = tuple(map(tuple, masks))
        if len(self.masks) != self.num_groups:
            raise ValueError(f"masks must be {self.num_groups} groups, one for each batch; got {len(self.masks)}.")
        shapes = {batch.block_tables.shape for batch in (first, *others)}
        if len(shapes) > 1:
            raise ValueError(f"The batches of all groups must have block_tables of one shape; got {sorted(shapes)}.")
        flat = [mask for group in self.masks for mask in group]
        if len(set(flat)) < len(flat):
            raise ValueError(f"A mask belongs to one group; got {[list(map(str, group)) for group in self.masks]}.")

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return 1 + len(self.own)

    @property
    def batches(self) -> tuple[RaggedBatch, ...]:
        """The step of each group."""
        return tuple(map(self._batch, range(self.num_groups)))

    def for_spec(self, spec: AttentionSpec) -> RaggedBatch:
        """The step of the layers with this spec: with the block table of their group.

        **Arguments:**

        - `spec`: whose mask decides.

        Raises ``ValueError`` where no group has the mask, and none keeps every page.
        """
        return self._batch(self._group_of(spec))

    def for_layer(self, layer: Any, num_pages: Any, num_layers: int, devices: int = 1) -> "GroupedBatch":
        """This step for one of several layers whose pages lie in one pool, see `RaggedBatch.for_layer`.

        **Arguments:**

        - `layer`, `num_pages`, `num_layers`, `devices`: as there. The layer's own group has ``num_pages`` pages.
        """
        return self._map(lambda batch: batch.for_layer(layer, num_pages, num_layers, devices))

    def naming(self, names: Iterable[str]) -> "GroupedBatch":
        """This step with the values of these names alone, see `RaggedBatch.naming`."""
        names = tuple(names)
        return self._map(lambda batch: batch.naming(names))

    def with_group(self, spec: AttentionSpec, batch: RaggedBatch) -> "GroupedBatch":
        """This step with another batch for the group of a spec, such as one that `paged.check` has marked.

        **Arguments:**

        - `spec`: whose group it is.
        - `batch`: the group's batch. What is the same for all groups is then this batch's.
        """
        batches = [dataclasses.replace(batch, **_own(old), checked_for=old.checked_for) for old in self.batches]
        batches[self._group_of(spec)] = batch
        return GroupedBatch(batches, self.masks)

    @property
    def lengths(self) -> Int[Array, " seqs"]:
        """See `RaggedBatch`."""
        return self.common.lengths

    @property
    def query_starts(self) -> Int[Array, " seqs_plus_1"]:
        """See `RaggedBatch`."""
        return self.common.query_starts

    @property
    def num_seqs(self) -> Int[Array, ""]:
        """See `RaggedBatch`."""
        return self.common.num_seqs

    @property
    def values(self) -> dict[str, Array]:
        """See `RaggedBatch`."""
        return self.common.values

    @property
    def positions(self) -> Int[Array, " tokens"] | None:
        """See `RaggedBatch`."""
        return self.common.positions

    @property
    def ancestors(self) -> Int[Array, "tokens words"] | None:
        """See `RaggedBatch`."""
        return self.common.ancestors

    @property
    def query_rows(self) -> int | None:
        """See `RaggedBatch`."""
        return self.common.query_rows

    @property
    def num_slots(self) -> Any:
        """See `RaggedBatch`."""
        return self.common.num_slots

    @property
    def pages_per_seq(self) -> Any:
        """See `RaggedBatch`."""
        return self.common.pages_per_seq

    def _batch(self, group: int) -> RaggedBatch:
        if group == 0:
            return self.common
        return dataclasses.replace(self.common, **self.own[group - 1], checked_for=self.checked_for[group - 1])

    def _group_of(self, spec: AttentionSpec) -> int:
        mask = spec.visibility
        for wanted in (mask, Everything()):
            for group, masks in enumerate(self.masks):
                if wanted in masks:
                    return group
        raise ValueError(
            f"The batch has no block table for the mask {mask}. It has groups for "
            f"{'; '.join(', '.join(map(str, masks)) for masks in self.masks)}, which free pages that this mask may "
            "need. Name the mask's spec where the pool is made; `generate` finds specs of attentions in the model's "
            "fields, containers and closures."
        )

    def _map(self, change: Callable[[RaggedBatch], RaggedBatch]) -> "GroupedBatch":
        return GroupedBatch(map(change, self.batches), self.masks)


def _own(batch: RaggedBatch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in _OWN}


def batch_for(spec: AttentionSpec, step: Any) -> Any:
    """A step as the attentions of a spec read it: of a `GroupedBatch` the batch of their group, else the step."""
    return step.for_spec(spec) if type(step) is GroupedBatch else step
