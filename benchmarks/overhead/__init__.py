"""What Python adds to a call: each entry point beside a bare ``jax.jit`` of the same computation and arrays."""
