"""`Served`: the models that a loop runs, and what follows from them: groups of layers, pages, tokens, shards."""

from typing import Any, NamedTuple

import equinox as eqx
import jax

from paged.spec import AttentionSpec, Everything, Minimum

from .._groups import Masks, page_groups
from .._held import GroupSizes, group_sizes
from .._masks import specs_of
from .._new_pools import why_not_shared
from .drafting import ModelDraft
from .forward import logits_of
from .shards import Shards, in_each, shards_of_all
from .speculation import require_speculation
from .state import Queue, ServeState


class Served(NamedTuple):
    """The models that a loop runs.

    * ``models``: each with its state: the served one, then a draft model, if there is one.
    * ``shards``: of sequences, see `Shards`; or None. * ``num_drafts``: the most of a sequence in a step.
    """

    models: tuple[tuple[Any, eqx.nn.State], ...]
    shards: Shards | None
    num_drafts: int

    @classmethod
    def of(cls, model: Any, state: eqx.nn.State, speculation: Any) -> "Served":
        """A model and where drafts come from. ``ValueError`` or ``TypeError`` for what does not go together."""
        models: Any = ((model, state),)
        if speculation is not None:
            require_speculation(state, speculation)
            models += ((speculation.model, speculation.state),) if isinstance(speculation, ModelDraft) else ()
        return cls(models, shards_of_all(models), 0 if speculation is None else speculation.num_tokens)

    @property
    def num_shards(self) -> int:
        """How many shards of sequences there are; 1 without a mesh."""
        return 1 if self.shards is None else self.shards.count

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """Of all attentions."""
        return tuple(dict.fromkeys(spec for model, _ in self.models for spec in specs_of(model)))

    @property
    def minima(self) -> tuple[Minimum, ...]:
        """What the numbers of requests are checked for."""
        return tuple(dict.fromkeys(minimum for spec in self.specs for minimum in spec.minima))

    @property
    def groups(self) -> tuple[Masks, ...]:
        """The masks of each group of layers."""
        return page_groups(self.specs) or ((Everything(),),)

    def share(self, name: str, number: int) -> int:
        """What a shard has of a number of all. ``ValueError`` unless each has as many."""
        return number if self.shards is None else self.shards.share(name, number)

    def budget(self, num_slots: int, chunk_size: int) -> int:
        """The most rows of a step of one shard: one in which every sequence has all its drafts must fit too."""
        return max(num_slots + chunk_size, num_slots * (1 + self.num_drafts))

    def sizes(self, num_pages: Any, page_size: Any) -> GroupSizes:
        """The sizes of a shard's pools. ``ValueError`` where a draft model has fewer pages than the served model."""
        (model, state), *drafting = self.models
        held = group_sizes(model, state, self.groups, num_pages, page_size, drafting)
        if drafting:
            own = group_sizes(model, state, page_groups(specs_of(model)) or ((Everything(),),), num_pages, page_size)
            if max(held.num_pages) < max(own.num_pages):
                raise ValueError(
                    f"A ModelDraft needs as many pages as the model that it drafts for, because both use the same "
                    f"block tables: that one has {max(own.num_pages)}, and the draft model {max(held.num_pages)}. Make "
                    f"its state with as many, or pass num_pages={max(held.num_pages)}."
                )
        return held._replace(num_pages=tuple(self.share("num_pages", n) for n in held.num_pages))

    def why_not_shared(self) -> str | None:
        """Why a prefix cache cannot share the pages of these models. A draft model without any has none to share."""
        served, *drafting = self.models
        having = [(own, pages) for own, pages in drafting if any(map(eqx.is_array, jax.tree.leaves(pages)))]
        reasons = (why_not_shared(specs_of(own), pages) for own, pages in (served, *having))
        return next((reason for reason in reasons if reason is not None), None)

    def vocabulary(self, queue: Queue, budget: int) -> int:
        """How many tokens the model knows: as many as its draft model. Both are traced, and nothing runs."""

        def logits(model: Any, own: ServeState) -> tuple[ServeState, Any]:
            return own, logits_of(model, own.queue, own.model_state, budget, self.minima)

        told = [
            eqx.filter_eval_shape(in_each, self.shards, logits, model, ServeState(queue, state))[1]
            for model, state in self.models
        ]
        sizes = [own.shape[-1] for own in told]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"A ModelDraft must know the tokens of the model that it drafts for: that one has {sizes[0]} logits, "
                f"and the draft model {sizes[1]}."
            )
        return sizes[0]
