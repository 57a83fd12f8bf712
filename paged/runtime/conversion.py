"""`convert`: every ``eqx.nn.MultiheadAttention`` of a model as a `PagedAttention`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax

from paged.spec import Causal, Mask, PageLayout

from .attention import PagedAttention


class Conversion(NamedTuple):
    """What `convert` returns. Printed, it says which attentions serve from pages, and which do not and why.

    - `model`: the model, with `PagedAttention` in place of ``MultiheadAttention``.
    - `state`: the state that holds the pages, and what was in the state that `convert` was given.
    - `replaced`: the layers that are new, by their paths in the model.
    - `left`: why others were left, by their paths.
    """

    model: Any
    state: eqx.nn.State
    replaced: Mapping[str, PagedAttention]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{path}: {_summary(layer)}" for path, layer in self.replaced.items()]
        return "\n".join([*lines, *(f"{path}: not paged, {why}" for path, why in self.left.items())])


def convert(
    model: Any,
    *,
    layout: PageLayout,
    num_pages: int,
    mask: Mask = Causal(),  # noqa: B008, a frozen declaration
    choose: Callable[[str, eqx.nn.MultiheadAttention], Mapping[str, Any] | None] | None = None,
    state: eqx.nn.State | None = None,
    **how: Any,
) -> Conversion:
    """Replace every ``eqx.nn.MultiheadAttention`` of an Equinox model by a `PagedAttention` with its parameters.

    The model trains as before: a `PagedAttention` is called as the ``MultiheadAttention`` was. All other leaves stay,
    and so does the order of all leaves. A checkpoint of the old model loads into the new one by
    ``eqx.tree_deserialise_leaves``, and the other way round. An optimiser's state has the same leaves too:
    ``jax.tree.unflatten(jax.tree.structure(optim.init(parameters)), jax.tree.leaves(old_state))`` with the parameters
    of the new model.

    To serve, the model calls each layer as ``y, state = layer(x, batch, state)``, with the rows of a step instead of a
    sequence: the rows of all sequences are one array [tokens, features], and there is no ``vmap`` over sequences.

    **Arguments:**

    - `model`: any pytree.
    - `layout`, `num_pages`, `mask`: of the layers, see `PagedAttention.from_multihead`. The mask must say what the
      arrays say that the model passes: an encoder whose tokens see all others has no causal mask.
    - `choose`: ``choose(path, mha)`` gives the arguments that differ for one layer, such as ``{"mask": Everything()}``,
      or None to leave the layer as it is. A path is that of `jax.tree_util.keystr`: ``".blocks[0].attention"``.
    - `state`: the state of a model that has some, from ``eqx.nn.make_with_state``.
    - `how`: other arguments of `PagedAttention.from_multihead`: ``rotary``, ``target``, ``check``, ...

    **Returns:** a `Conversion`, ``model, state, replaced, left``.

    Raises ``ValueError`` that names the path and the reason of every layer that pages cannot serve and `choose` does
    not leave: a subclass of ``MultiheadAttention``, stacked layers, layers that ``eqx.nn.Shared`` calls more than once,
    float64, a layout of other heads. Raises ``ValueError`` too for a model that has none, or whose state is not given.

    >>> mlp = eqx.nn.MLP(8, 8, 16, 1, key=jax.random.key(1))
    >>> model = {"attention": eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(0)), "mlp": mlp}
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=4, dtype=jnp.float32)
    >>> converted = paged.convert(model, layout=layout, num_pages=8)
    >>> print(converted)
    ['attention']: 2 heads of 4, mask j <= p, pages of 4 tokens
    >>> x = jnp.ones((3, 8))
    >>> batch = RaggedBatch.prefill(length=3, block_table=[5], query_rows=3)
    >>> y, state = converted.model["attention"](x, batch, converted.state)
    """
    _require_state(model, state)
    nodes, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_multihead)
    arguments = {"layout": layout, "num_pages": num_pages, "mask": mask, **how}
    shared, places = _shared_ids(model), {jax.tree_util.keystr(path): i for i, (path, _) in enumerate(nodes)}
    made: dict[str, PagedAttention] = {}
    left: dict[str, str] = {}
    refused: dict[str, str] = {}
    for path, i in places.items():
        mha = nodes[i][1]
        if not _is_multihead(mha):
            continue
        changes = {} if choose is None else choose(path, mha)
        if changes is None:
            left[path] = "because choose returned None"
        elif id(mha) in shared:
            refused[path] = "eqx.nn.Shared calls it more than once in a step, and each call needs pages of its own"
        else:
            try:
                made[path] = PagedAttention.from_multihead(mha, **{**arguments, **changes})
            except ValueError as error:
                refused[path] = str(error)
    _require_all(made, left, refused)
    with_markers, pages = eqx.nn.make_with_state(lambda: made)()
    new = {path: with_markers[path] for path in made}  # in the model's order: JAX sorts the keys of a dict
    leaves = [node for _, node in nodes]
    for path, layer in new.items():
        leaves[places[path]] = layer
    return Conversion(jax.tree.unflatten(structure, leaves), _joined(state, pages), new, left)


def _require_all(made: Mapping[str, Any], left: Mapping[str, str], refused: Mapping[str, str]) -> None:
    if refused:
        reasons = "".join(f"\n    {path}: {why}" for path, why in refused.items())
        raise ValueError(f"Pages cannot serve these layers; choose=... may return None to leave one as it is:{reasons}")
    if not made:
        raise ValueError(
            "The model has no eqx.nn.MultiheadAttention to replace"
            + (f": choose left {', '.join(left)}." if left else ". Other attention calls a paged.runtime.PagedCache.")
        )


def _require_state(model: Any, state: eqx.nn.State | None) -> None:
    """Raise ``ValueError`` where the model has state that was not taken out of it, or that was not given."""
    indices = [x for x in jax.tree.leaves(model, is_leaf=_is_index) if _is_index(x)]
    if any(jax.tree.leaves(index.init) for index in indices):
        raise ValueError(
            "The model's layers have state: make it by eqx.nn.make_with_state, and give convert the state."
        )
    if indices and state is None:
        raise ValueError("The model's layers have state: give convert state=, as eqx.nn.make_with_state returned it.")


def _joined(state: eqx.nn.State | None, pages: eqx.nn.State) -> eqx.nn.State:
    """One state with what both hold."""
    if state is None:
        return pages
    (old, old_names), (new, new_names) = state.tree_flatten(), pages.tree_flatten()
    return eqx.nn.State.tree_unflatten((*old_names, *new_names), (*old, *new))


def _shared_ids(tree: Any) -> set[int]:
    """Of every attention that an ``eqx.nn.Shared`` puts into more than one place."""
    found: set[int] = set()
    for node in jax.tree.leaves(tree, is_leaf=_is_shared):
        if _is_shared(node):
            given = jax.tree.leaves(node.get(node.pytree), is_leaf=_is_multihead)
            found |= {id(x) for x in given if _is_multihead(x)} | _shared_ids(node.pytree)
    return found


def _summary(layer: PagedAttention) -> str:
    spec, layout = layer.spec, layer.layout
    tokens = f"pages of {layout.page_size} tokens"
    return f"{spec.num_q_heads} heads of {spec.head_dim}, mask {spec.visibility}, {tokens}"


def _is_multihead(x: Any) -> bool:
    return isinstance(x, eqx.nn.MultiheadAttention)


def _is_shared(x: Any) -> bool:
    return isinstance(x, eqx.nn.Shared)


def _is_index(x: Any) -> bool:
    return isinstance(x, eqx.nn.StateIndex)
