"""The gradient of a prefill chunk with respect to queries and pages, over the time of the forward pass."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

import paged

from .inputs import layout, prefill_inputs, spec
from .measure import Row, Setting, compiled, interleaved, progress

_CHUNK = 512


def run(setting: Setting) -> Iterator[Row]:
    """A chunk of 512 at 512 tokens, and at 2048; pools of no more pages than that."""
    dtypes = ("float32",) if setting.is_quick else ("float32", "bfloat16")
    cases = [(dtype, length) for dtype in dtypes for length in ((512,) if setting.is_quick else (512, 2048))]
    for dtype, length in progress("gradient", setting, cases):
        inputs = prefill_inputs(layout(dtype, 16), length, _CHUNK)
        attend = paged.lower(spec(), inputs.pages.layout, target="xla")
        weights = jax.random.normal(jax.random.key(2), inputs.q.shape)

        def loss(q, pages, batch, weights, attend=attend):
            return jnp.sum(attend(q, pages, batch).astype(jnp.float32) * weights)

        args = (inputs.q, inputs.pages, inputs.batch, weights)
        candidates = {
            "forward": compiled(loss, *args),
            "value and gradient": compiled(jax.value_and_grad(loss, argnums=(0, 1)), *args),
        }
        samples = interleaved(candidates, setting)
        for name, candidate in candidates.items():
            yield Row(
                "gradient",
                f"{dtype}, chunk {_CHUNK} at {length} tokens",
                name,
                setting.cores,
                samples.median(name),
                samples.ratio(name, "forward"),
                candidate.temporaries,
                candidate.compile_seconds,
                samples.others,
            )
