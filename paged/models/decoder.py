"""`Decoder`: the model of every architecture, from tokens to logits."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from paged.lower import Axes, Step
from paged.runtime import LayerStack, pages_for
from paged.spec import PageLayout

from .config import Config, LayerConfig
from .experts import draw
from .layers import DecoderLayer, Projection, RMSNorm, TurnedProjection, product


class Embedding(eqx.Module):
    """A row of features for each token id, times a factor."""

    weight: Float[Array, "vocab features"]
    scale: float = eqx.field(static=True)

    def __call__(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows features"]:
        x = self.weight[tokens]
        return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)


class Decoder(eqx.Module):
    """A decoder-only transformer, whose `Config` says what its layers have: served from pages, or run without.

    * ``logits, state = model(tokens, batch, state)`` serves, as `paged.runtime.generate` calls it.
    * ``model.dense(tokens)`` computes whole sequences from the same parameters, without pages; differentiable.
    * ``model.features(tokens, batch, state)`` and ``model.logits(x)`` are the two parts of the first: `generate` makes
      logits of those rows only from which it draws.

    `load` makes one from a checkpoint, and `save` writes one. This constructor draws its parameters. Layers that are
    alike are stacked, see `LayerStack`, and attributes have the names that checkpoints have for them; queries, keys and
    values are one product, and so are the gate and what it gates.

    >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    >>> counts = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    >>> config = Config.from_keys({"model_type": "llama", **sizes, **counts})
    >>> layout = config.layout(page_size=4, dtype=jnp.float32)
    >>> model, state = eqx.nn.make_with_state(Decoder)(config, layout, num_pages=8, key=jax.random.key(0))
    >>> tokens = jnp.array([3, 1, 4, 1, 5])
    >>> logits, state = model(tokens, RaggedBatch.prefill(length=5, block_table=[3, 1], query_rows=5), state)
    >>> bool(jnp.allclose(logits, model.dense(tokens), atol=1e-5))
    True
    """

    embed_tokens: Embedding
    layers: LayerStack
    norm: RMSNorm
    lm_head: Projection | None
    config: Config = eqx.field(static=True)

    def __init__(
        self,
        config: Config,
        layout: PageLayout,
        num_pages: int,
        *,
        num_slots: int | None = None,
        chunk_size: int = 64,
        target: str = "auto",
        check: bool = True,
        mesh: Mesh | None = None,
        axes: Axes | None = None,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `config`: what the model is.
        - `layout`: how the pages of each layer lie in memory, see `Config.layout`.
        - `num_pages`: how many pages each layer has.
        - `num_slots`, `chunk_size`: how many sequences run at once, and the most rows that one has in a step. Layers
          whose masks free pages, such as those with a window, then have only what so many sequences need of them, see
          `paged.runtime.pages_for`. None: as many pages as other layers.
        - `target`, `check`, `mesh`, `axes`: see `PagedCache`.
        - `dtype`: of the parameters, and of what is computed with them.
        - `key`: a PRNG key, from which the parameters are drawn.

        Call it inside of what ``eqx.nn.make_with_state`` is given.
        """
        how = {"target": target, "check": check, "mesh": mesh, "axes": axes}
        embedding, head, layers = jax.random.split(key, 3)
        shape = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(draw(embedding, shape, dtype), config.embedding_scale)

        def pages_of(layer: LayerConfig) -> int:
            if num_slots is None:
                return num_pages
            sizes = {"num_pages": num_pages, "num_slots": num_slots, "page_size": layout.page_size}
            return pages_for(config.spec(layer).visibility, pages_per_seq=num_pages, chunk_size=chunk_size, **sizes)

        def maker(layer: LayerConfig) -> Any:
            return lambda key: DecoderLayer(config, layer, layout, pages_of(layer), how, dtype, key)

        makers = {layer: maker(layer) for layer in dict.fromkeys(config.layers)}
        pattern = [makers[layer] for layer in config.layers[: _period(config.layers)]]
        self.layers = LayerStack.make(pattern, jax.random.split(layers, len(config.layers)))
        self.norm = RMSNorm(config.hidden_size, config, dtype)
        self.lm_head = None if config.is_tied else Projection(shape[:1], shape[1], False, dtype, head)
        self.config = config

    def __call__(
        self, tokens: Int[Array, " tokens"], batch: Step, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens vocab"], eqx.nn.State]:
        """Serve the rows of a step.

        **Arguments:**

        - `tokens`: the token ids of the rows.
        - `batch`: whose rows these are, and where the tokens of their sequences lie.
        - `state`: the state that holds the pages. Donate it to ``jax.jit``, and they are updated in place.

        **Returns:** logits in the dtype of the parameters, and the new state. Rows of no sequence give logits that mean
        nothing.
        """
        x, state = self.features(tokens, batch, state)
        return self.logits(x), state

    def features(
        self, tokens: Int[Array, " tokens"], batch: Step, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens features"], eqx.nn.State]:
        """What the last layer gives for the rows of a step, from which `logits` makes logits. See `__call__`."""
        return self.layers(self.embed_tokens(tokens), batch, state)

    def logits(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows vocab"]:
        """Logits of rows of `features`: the last norm, and the head."""
        x = self.norm(x)
        if self.lm_head is not None:
            logits = self.lm_head(x)
        else:
            weight = self.embed_tokens.weight
            logits = product(x, weight)
        cap = self.config.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def apart(self) -> "Decoder":
        """This model, to serve on a CPU, where it then copies no layer's parameters: see `LayerStack.apart`.

        And a float32 weight is stored with its features first, as XLA:CPU multiplies faster.

        **Returns:** a model that computes the same. The layers' parameters are copies: let go of this model. For
        training, `together` gives a model like this one.
        """
        return self._with_layers(_mapped(TurnedProjection.of, self.layers, Projection).apart())

    def together(self) -> "Decoder":
        """This model as it was before `apart`: stacked, with the features of every weight last."""
        return self._with_layers(_mapped(TurnedProjection.back, self.layers.together(), TurnedProjection))

    def _with_layers(self, layers: LayerStack) -> "Decoder":
        return eqx.tree_at(lambda model: model.layers, self, layers)

    def dense(self, tokens: Int[Array, "*batch tokens"]) -> Float[Array, "*batch tokens vocab"]:
        """Logits at every position of whole sequences, computed without pages: for training, and to check a cache.

        **Arguments:**

        - `tokens`: one sequence, or a batch of sequences of one length.

        **Returns:** the logits, in the dtype of the parameters.
        """
        x = self.embed_tokens(tokens.reshape(-1, tokens.shape[-1]))
        logits = self.logits(self.layers.dense(x))
        return logits.reshape(*tokens.shape, -1)


def _mapped(f: Callable[[Any], Any], layers: LayerStack, kind: type) -> LayerStack:
    """The stack with ``f`` of every part of a kind."""
    is_one = lambda x: isinstance(x, kind)
    return jax.tree.map(lambda x: f(x) if is_one(x) else x, layers, is_leaf=is_one)


def _period(kinds: tuple[LayerConfig, ...]) -> int:
    """After how many layers their kinds repeat."""
    return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i - p] for i in range(p, len(kinds))))
