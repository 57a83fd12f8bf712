"""How many programs XLA compiles."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that has an item more for each program that is compiled."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    try:
        yield compiled
    finally:
        jax.monitoring.clear_event_listeners()
