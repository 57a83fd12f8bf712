"""A tree of drafts through a stack of layers: scored, accepted, moved together, and decoding goes on."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged import RaggedBatch, tree
from paged.runtime import LayerStack, PagedAttention, Rotary, commit

LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=9)


class Block(eqx.Module):
    attention: PagedAttention

    def __call__(self, x, batch, state):
        y, state = self.attention(x, batch, state)
        return x + y, state


def stack_of(mask):
    def make(key):
        return Block(PagedAttention(SPEC.replace(mask=mask), LAYOUT, 16, 32, rotary=Rotary(8), key=key))

    return eqx.nn.make_with_state(LayerStack.make)(make, jax.random.split(jax.random.key(0), 3))


@pytest.mark.kernels
def test_decoding_goes_on_from_the_accepted_path_as_if_it_had_been_decoded():
    """Two sequences of unlike paths; the pages of three layers are one pool."""
    (drafted, state), (plain, other) = stack_of(paged.Tree()), stack_of(None)
    tables, drafts = np.arange(16).reshape(2, 8)[:, ::-1], tree.from_topk((2, 2))
    x = jax.random.normal(jax.random.key(1), (2, 20, 32))
    step = eqx.filter_jit(lambda stack, x, batch, state: stack(x, batch, state))
    prompts = dict(lengths=[5, 3], block_tables=tables, query_starts=[0, 5, 8])
    # As many rows as there are drafts, so that each stack compiles two steps: the last rows are of no sequence.
    rows = jnp.concatenate([x[0, :5], x[1, :3], jnp.zeros((6, 32))])
    _, state = step(drafted, rows, RaggedBatch(**prompts), state)
    _, other = step(plain, rows, RaggedBatch(**prompts), other)

    batch = tree.batch([5 + 7, 3 + 7], tables, drafts)
    _, state = step(drafted, x[:, 5:12].reshape(14, 32), batch, state)
    paths, count = jnp.array([[0, 2, 6], [0, 1, 0]]), jnp.array([3, 2])
    state = eqx.filter_jit(commit)(state, batch, paths, count)

    accepted = jnp.concatenate([x[0, 5:12][paths[0]], x[1, 5:12][paths[1, :2]], jnp.zeros((9, 32))])
    _, other = step(plain, accepted, RaggedBatch([8, 5], tables, [0, 3, 5]), other)
    want, _ = step(plain, x[:, 12], RaggedBatch.decode([9, 6], tables), other)
    got, _ = step(drafted, x[:, 12], RaggedBatch.decode([9, 6], tables), state)
    np.testing.assert_allclose(got, want, atol=1e-5)
