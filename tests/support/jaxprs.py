"""What a traced function does, read off its jaxpr."""

import jax.extend.core


def primitives(jaxpr):
    """The names of all primitives of a jaxpr, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from primitives(inner)
