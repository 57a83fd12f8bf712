"""Requests that arrive over time, served by `paged.runtime.Engine` and by others: ``python -m benchmarks.serving``."""
