"""A step is planned once for each mask, in a `LayerStack` and in `generate`, and its results keep every bit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import LayerStack, cache
from paged.runtime._model_call import apply
from tests.support.jaxprs import primitives

from .test_layer_stack import NUM_PAGES, Block, blocks, keys_of, model_of
from .tiny import EMBED, GLOBAL, LAYOUT, LOCAL

# What it takes to list the pages that rows see, and the places of new rows.
LISTS = {"sort", "cumsum", "cummax"}
SPECS = (LOCAL, GLOBAL)
# A hole, and an entry past the pages of a layer, where the pages of the next layer begin.
BATCH = paged.RaggedBatch([6, 5, 2], [[7, 2], [4, NUM_PAGES], [-1, 1]], [0, 2, 5, 6])


class Changing(Block):
    """A layer whose attention is called with the batch, with another one, and inside of a jit of its own."""

    def __call__(self, x, batch, state):
        moved = eqx.tree_at(lambda b: b.block_tables, batch, batch.block_tables[:, ::-1])
        for call, own in ((super().__call__, batch), (self.attention, moved), (eqx.filter_jit(self.attention), batch)):
            x, state = call(x, own, state)
        return x, state


def _unplanned(monkeypatch):
    monkeypatch.setattr(cache, "planned", lambda attend, q, pages, step: step)


def _assert_bitwise(one, other):
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(x, y)


def _stack(layer, specs):
    stack, state = eqx.nn.make_with_state(lambda: LayerStack.of(_blocks_of(layer, specs)))()
    return stack, (jax.random.normal(jax.random.key(3), (6, EMBED)), BATCH, state)


def _blocks_of(layer, specs):
    return [layer(spec, key, check=False) for spec, key in zip(specs, keys_of(len(specs)), strict=True)]


@pytest.mark.kernels
def test_layers_that_use_other_batches_too_give_to_the_bit_what_they_give_without_plans(monkeypatch):
    stack, args = _stack(Changing, (GLOBAL, GLOBAL))
    planned = jax.jit(lambda *args: stack(*args))(*args)
    _unplanned(monkeypatch)
    _assert_bitwise(planned, jax.jit(lambda *args: stack(*args))(*args))


def test_no_list_is_made_in_the_loop_over_layers_and_one_for_each_mask_before_it(monkeypatch):
    stack, args = _stack(Block, (*SPECS, *SPECS, LOCAL))

    def traced():
        jaxpr = jax.make_jaxpr(lambda *args: stack(*args))(*args).jaxpr
        (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
        return list(primitives(jaxpr)), list(primitives(loop.params["jaxpr"].jaxpr))

    everywhere, inside = traced()
    # Of a plan: the pages of single rows, those of the others, and the new rows.
    assert not LISTS & set(inside) and everywhere.count("sort") == 3 * len(SPECS)
    _unplanned(monkeypatch)
    everywhere, inside = traced()
    assert set(inside) >= LISTS and everywhere.count("sort") == 3  # two in the loop, one in the layer after it


@pytest.mark.parametrize("is_stack", [pytest.param(False, marks=pytest.mark.kernels), True])
def test_a_step_of_generate_is_planned_once_for_each_mask(is_stack, monkeypatch):
    make = lambda: LayerStack.of(blocks(4, SPECS)) if is_stack else tuple(blocks(4, SPECS))
    model, state = model_of(make)
    batch = paged.check(GLOBAL, LAYOUT.init(NUM_PAGES), paged.RaggedBatch.decode([6, 5], [[7, 2], [4, 3]]), 2)
    args = jnp.array([3, 1]), batch, state
    # The function under the jit, which keeps what it has traced.
    step = lambda: jax.make_jaxpr(lambda *args: apply.__wrapped__(model, *args))(*args)
    assert list(primitives(step().jaxpr)).count("sort") == 2 * len(SPECS)  # of a plan: its pages, and the new rows
    planned = jax.jit(lambda *args: apply.__wrapped__(model, *args))(*args)
    _unplanned(monkeypatch)
    assert list(primitives(step().jaxpr)).count("sort") == (2 if is_stack else 4)
    _assert_bitwise(planned, jax.jit(lambda *args: apply.__wrapped__(model, *args))(*args))
