"""`LayerStack`: the layers of a model as one scan, with stacked parameters and one pool of pages."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.lower import Attend, Plan, Step, check_values, demands_of
from paged.spec import GroupedBatch, batch_for

from ._apart import is_apart
from ._in_turn import in_turn
from ._pattern import Segment, places_of, segments_of
from ._run import apart, kinds_of, layer_of, made_together, parts_of, replaced, serve_one, stacked, together
from ._step_plans import StepPlans
from .cache import PagedCache
from .stacked_state import pools_of

Maker = Callable[[Any], Any]


class LayerStack(eqx.Module):
    """The layers of a model, one after the other, compiled once for each kind of layer.

    Like layers have their parameters stacked on a leading axis and their pages in one pool, and ``jax.lax.scan`` runs
    them. The pool is carried from layer to layer and written in place. Each layer sees the block tables shifted to its
    own pages, see `RaggedBatch.for_layer`. So a deep model compiles as fast as a shallow one, and no page is copied.
    What attentions of one mask compute from the batch alone is computed once for each mask, before the scan, see
    `paged.Plan`: for every `PagedAttention` and `PagedCache` that is called with the batch that its layer was given.

    * ``y, state = stack(x, batch, state)`` serves: each layer is called as ``x, state = layer(x, batch, state)``.
    * ``stack.dense(x)`` trains: each layer is called as ``x = layer.dense(x)``.
    * ``stack.fold(f, x)`` runs ``x = f(layer, x)``, where ``f`` needs no state.

    A layer is any Equinox module that keeps its pages in the state, such as a block of a `PagedAttention` and a
    perceptron. Layers may differ. Five layers with a window and one without, over and over, are a scan over the
    repetitions, and in each of them a scan over the five and one layer more. Layers that do not fill a repetition run
    after it.

    - `runs`: a layer for each run of like layers in the pattern, with stacked arrays.
    - `segments`: the pattern, static: how often which runs follow one another.

    `make` makes a stack from keys, `of` from layers. A page has the same number in all layers, so that one `PagePool`
    serves the stack.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> def make_layer(key):
    ...     return PagedAttention(spec, layout, num_pages=8, embed_dim=32, rotary=Rotary(8), key=key)
    >>> stack, state = eqx.nn.make_with_state(LayerStack.make)(make_layer, jax.random.split(jax.random.key(0), 6))
    >>> len(stack), stack.layer(5).query_proj.weight.shape, stack.runs[0].query_proj.weight.shape
    (6, (32, 32), (6, 32, 32))
    >>> x = jax.random.normal(jax.random.key(1), (5, 32))
    >>> y, state = stack(x, RaggedBatch.prefill(length=5, block_table=[3, 1], query_rows=5), state)
    >>> bool(jnp.allclose(y, stack.dense(x[None])[0], atol=1e-5))
    True
    """

    runs: tuple[Any, ...]
    segments: tuple[Segment, ...] = eqx.field(static=True)

    @classmethod
    def make(cls, make_layer: Maker | Sequence[Maker], keys: Array | Sequence[Array]) -> "LayerStack":
        """A stack of new layers, made without a second copy of parameters or pages.

        **Arguments:**

        - `make_layer`: ``make_layer(key)`` makes a layer. A list is a pattern: layer ``i`` is made by
          ``make_layer[i % len(make_layer)]``, as in ``[local, local, full]``. Layers are alike where they are equal but
          for the values of their arrays.
        - `keys`: PRNG keys, one for each layer.

        **Returns:** the stack, whose pages are zeros. Call it inside of what ``eqx.nn.make_with_state`` is given.

        Raises ``ValueError`` where there are no keys, and where the pages inside of one layer differ in number.

        >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
        >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8)
        >>> full = lambda key: PagedAttention(spec, layout, num_pages=8, embed_dim=32, key=key)
        >>> local = lambda key: PagedAttention(spec.replace(window=8), layout, num_pages=8, embed_dim=32, key=key)
        >>> keys = jax.random.split(jax.random.key(0), 8)
        >>> stack, state = eqx.nn.make_with_state(LayerStack.make)([local, local, full], keys)
        >>> [layer.spec.window for layer in stack.unstack()]
        [8, 8, None, 8, 8, None, 8, 8]
        """
        makers = [make_layer] if callable(make_layer) else list(make_layer)
        if not len(keys) or not makers:
            raise ValueError(f"A LayerStack needs a layer: got {len(keys)} keys, and {len(makers)} to make layers.")
        kinds = kinds_of(eqx.filter_eval_shape(make, keys[0]) for make in makers)
        segments = segments_of([kinds[i % len(makers)] for i in range(len(keys))])
        # By index: JAX cannot iterate over typed keys inside of a trace that does not trace them.
        pairs = [(makers[i % len(makers)], keys[i]) for i in range(len(keys))]
        return cls(tuple(made_together(*zip(*run, strict=True)) for run in _by_run(segments, pairs)), segments)

    @classmethod
    def of(cls, layers: Sequence[Any]) -> "LayerStack":
        """A stack of layers that there are, in their order.

        Layers are alike where they are equal but for the values of their arrays. Their pages are copied into one pool;
        `make` needs no such copy.

        **Arguments:**

        - `layers`: at least one.

        **Returns:** the stack. Call it inside of what ``eqx.nn.make_with_state`` is given.

        Raises ``ValueError`` for no layers, for layers whose initial state ``make_with_state`` has taken already, and
        where the pages inside of one layer differ in number.

        >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
        >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8)
        >>> def model(key):
        ...     windows = [8, 8, None, 8, 8, None]
        ...     specs = [spec.replace(window=window) for window in windows]
        ...     return LayerStack.of([PagedAttention(s, layout, num_pages=8, embed_dim=32, key=key) for s in specs])
        >>> stack, state = eqx.nn.make_with_state(model)(jax.random.key(0))
        >>> len(stack), len(stack.runs)
        (6, 2)
        """
        if not layers:
            raise ValueError("A LayerStack needs a layer; got none.")
        segments = segments_of(kinds_of(layers))
        return cls(tuple(stacked(members) for members in _by_run(segments, layers)), segments)

    def __check_init__(self) -> None:
        for run in self.runs:
            sizes, parts = {pool.num_pages for pool in pools_of(run)}, math.prod(parts_of(run))
            if len(sizes) > 1:
                raise ValueError(
                    f"The pages inside of one layer must be equal in number; got {sorted(sizes)}. One block table "
                    "serves all of them."
                )
            if any(size % parts for size in sizes):
                raise ValueError(f"{parts} devices cannot share {sizes.pop()} pages of each layer evenly.")

    def __len__(self) -> int:
        return sum(segment.num_layers for segment in self.segments)

    def __call__(self, x: Any, batch: Step, state: eqx.nn.State) -> tuple[Any, eqx.nn.State]:
        """Serve the rows of one step: every layer as ``x, state = layer(x, batch, state)``, in order.

        **Arguments:**

        - `x`: what the first layer takes, such as float[tokens, embed_dim]: an array, or a pytree of arrays with rows
          first. Every layer returns it in the shapes and dtypes that it got.
        - `batch`: whose rows these are, and where the tokens of their sequences lie. Its page numbers are those of a
          pool for one layer. Of a `GroupedBatch` each layer uses the table of its spec's group. Or a plan that there is
          already, where all layers have one mask.
        - `state`: the state that holds the pages. Donate it to ``jax.jit``, and they are updated in place.

        **Returns:** what the last layer gives, and the new state. Raises what the layers raise. The values of a batch
        are checked once, before the first layer, for those layers that check.
        """
        if not isinstance(batch, Plan):  # whose batch was checked when it was made
            batch = self._checked(batch, jax.tree.leaves(x)[0].shape[0], state)
        plans = StepPlans.of(batch)

        def step(run: int, layer: Any, place: Any, carry: Any) -> Any:
            x, states = carry
            x, new = serve_one(layer, place, x, plans, states[run])
            return x, (*states[:run], new, *states[run + 1 :])

        carry = x, tuple(state.substate(run) for run in self.runs)
        # One layer of each run is traced without a result, because its calls say which plans they need: these are made
        # before the loop.
        jax.eval_shape(lambda carry: self._serve_firsts(step, carry), carry)
        plans.make_asked()
        x, states = self._serve(step, carry)
        for new in states:
            state = state.update(new)
        return x, state

    def dense(self, x: Any) -> Any:
        """Run every layer as ``x = layer.dense(x)``, in order: over whole sequences, without pages, differentiable.

        **Arguments:**

        - `x`: what the first layer takes, such as float[batch, tokens, embed_dim]. Every layer returns it in the shapes
          and dtypes that it got.
        """
        return self.fold(lambda layer, x: layer.dense(x), x)

    def fold(self, f: Callable[[Any, Any], Any], x: Any) -> Any:
        """Run ``x = f(layer, x)`` for every layer, in order.

        **Arguments:**

        - `f`: a function of a layer and ``x`` that needs no state. It is traced once for each run of like layers.
        - `x`: a pytree of arrays, which ``f`` returns in the shapes and dtypes that it got.

        >>> stack = LayerStack.make(lambda key: eqx.nn.Linear(4, 4, key=key), jax.random.split(jax.random.key(0), 3))
        >>> stack.fold(lambda layer, x: jax.nn.relu(layer(x)), jnp.ones(4)).shape
        (4,)
        """
        arrays, static = self.together()._parts()
        return self._walk(lambda run, x, layer: f(eqx.combine(layer, static[run]), x), x, arrays)

    def layer(self, i: int) -> Any:
        """Layer ``i`` alone, with its own parameters.

        Its ``dense`` works. Its pages are those of the stack: a call that serves needs the whole stack.

        **Arguments:**

        - `i`: the number of the layer, in ``[0, len(stack))``.
        """
        if not 0 <= i < len(self):
            raise ValueError(f"i must be in [0, {len(self)}), the layers of the stack; got {i}.")
        run, place = places_of(self.segments)[i]
        return layer_of(self.runs[run], place)

    def unstack(self) -> list[Any]:
        """All layers alone, in order, see `layer`."""
        return [self.layer(i) for i in range(len(self))]

    def apart(self) -> "LayerStack":
        """This stack, to serve on a CPU: each layer has its large arrays by itself, and its pages in the pool.

        XLA:CPU copies a layer's part out of a stacked array before it multiplies with it. Where a step has few rows,
        the copies take up to a fifth of its time. Here a product has a branch for each layer, and nothing is copied.
        Programs are larger, and take a little longer to compile. `together` gives a stack for training and for other
        platforms, and so does `with_layers`.

        **Returns:** a stack that computes the same. Its arrays are copies.

        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> stack = LayerStack.make(lambda key: eqx.nn.Linear(256, 256, key=key), keys)
        >>> parts = stack.apart()
        >>> [len(jax.tree.leaves(each)) for each in (stack, parts, parts.together())]
        [2, 4, 2]
        """
        return LayerStack(tuple(map(apart, self.runs)), self.segments)

    def together(self) -> "LayerStack":
        """This stack with all arrays stacked, see `apart`."""
        return LayerStack(tuple(map(together, self.runs)), self.segments)

    def with_layers(self, layers: Sequence[Any]) -> "LayerStack":
        """This stack with the arrays of these layers, such as those of a checkpoint. Its pages stay what they are.

        **Arguments:**

        - `layers`: one for each layer of the stack, like the ones that `unstack` gives.

        Raises ``ValueError`` where their number, or the structure, a shape or a dtype of one of them is another one.

        >>> stack = LayerStack.make(lambda key: eqx.nn.Linear(4, 4, key=key), jax.random.split(jax.random.key(0), 3))
        >>> twice = stack.with_layers([jax.tree.map(lambda x: 2 * x, layer) for layer in stack.unstack()])
        >>> bool((twice.layer(2).weight == 2 * stack.layer(2).weight).all())
        True
        """
        if len(layers) != len(self):
            raise ValueError(f"layers must be {len(self)}, as many as the stack has; got {len(layers)}.")
        numbered = _by_run(self.segments, enumerate(layers))
        runs = tuple(replaced(together(run), members) for run, members in zip(self.runs, numbered, strict=True))
        return LayerStack(runs, self.segments)

    def _checked(self, batch: Any, tokens: Any, state: eqx.nn.State) -> Any:
        """The batch, with its values checked for every cache that asks for it. On a mesh each device checks its own."""
        for run in self.runs:
            pages = [pool.num_pages for pool in pools_of(state.substate(run))]
            for cache in jax.tree.leaves(run, is_leaf=lambda x: isinstance(x, PagedCache)):
                if isinstance(cache, PagedCache) and cache.attend.check and isinstance(cache.attend, Attend):
                    spec, layout = cache.attend.spec, cache.attend.layout
                    sizes = {"page_size": layout.page_size, "num_pages": pages[0]}
                    own = check_values(batch_for(spec, batch), tokens=tokens, **sizes, **demands_of(spec))
                    batch = batch.with_group(spec, own) if isinstance(batch, GroupedBatch) else own
        return batch

    def _serve(self, step: Callable[[int, Any, Any, Any], Any], carry: Any) -> Any:
        """``carry = step(run, layer, place, carry)`` for every layer, where ``place`` counts the layers of its run.

        The loops count, and each layer takes its arrays out of the stack by its place. Arrays that were scanned over by
        an outer scan and an inner one would be copied by the outer one.
        """
        arrays, static = self._parts()

        def one_layer(run: int, place: Any, carry: Any) -> Any:
            place = jnp.asarray(place, jnp.int32)
            call = lambda own, carry: step(run, eqx.combine(own, static[run]), place, carry)
            return in_turn(call, arrays[run], place, carry)

        for repeats, runs in self.segments:

            def repetition(i: Any, carry: Any, runs: Any = runs) -> Any:
                for run, length in runs:
                    carry = _count(lambda j, carry, run=run, n=length: one_layer(run, i * n + j, carry), carry, length)
                return carry

            carry = _count(repetition, carry, repeats)
        return carry

    def _serve_firsts(self, step: Callable[[int, Any, Any, Any], Any], carry: Any) -> Any:
        """``carry = step(run, layer, place, carry)`` for the first layer of every run."""
        for run, layers in enumerate(self.runs):
            carry = step(run, layer_of(layers, 0), jnp.int32(0), carry)
        return carry

    def _parts(self) -> tuple[list[Any], list[Any]]:
        """Of every run, the arrays and what is not an array."""
        is_array = lambda x: eqx.is_array(x) or is_apart(x)
        parts = [eqx.partition(run, is_array, is_leaf=is_apart) for run in self.runs]
        return [arrays for arrays, _ in parts], [static for _, static in parts]

    def _walk(self, one_layer: Callable[[int, Any, Any], Any], carry: Any, xs_of_run: Sequence[Any]) -> Any:
        """``carry = one_layer(run, carry, x)`` for every layer, in order; ``x`` is from the leading axis of its run."""
        for repeats, runs in self.segments:

            def repetition(carry: Any, xs: Any, runs: Any = runs) -> Any:
                for (run, length), x in zip(runs, xs, strict=True):
                    carry = _repeat(functools.partial(one_layer, run), carry, x, length)
                return carry

            xs = [_split(xs_of_run[run], repeats, length) for run, length in runs]
            carry = _repeat(repetition, carry, xs, repeats)
        return carry


def _split(xs: Any, *sizes: int) -> Any:
    """The leading axis as several, without axes of 1: XLA:CPU would lay out anew what has them."""
    sizes = tuple(size for size in sizes if size > 1)
    return jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1:]), xs)


def _count(f: Callable[[Any, Any], Any], carry: Any, times: int) -> Any:
    """``carry = f(i, carry)`` for each ``i`` below ``times``: a loop, if there is more than one."""
    return f(0, carry) if times == 1 else jax.lax.fori_loop(0, times, f, carry)


def _repeat(f: Callable[[Any, Any], Any], carry: Any, xs: Any, times: int) -> Any:
    """``carry = f(carry, x)`` for each ``x``: a scan, if there is more than one. Of one, ``xs`` is the ``x``."""
    return f(carry, xs) if times == 1 else jax.lax.scan(lambda carry, x: (f(carry, x), None), carry, xs)[0]


def _by_run(segments: Sequence[Segment], layers: Any) -> list[list[Any]]:
    """What belongs to each layer, in lists, one for each run."""
    of_run: dict[int, list[Any]] = {}
    for (run, _), layer in zip(places_of(segments), layers, strict=True):
        of_run.setdefault(run, []).append(layer)
    return [of_run[run] for run in sorted(of_run)]
