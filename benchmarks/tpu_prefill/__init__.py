"""Prefill and ragged batches on TPUs, modelled without one: `python -m benchmarks.tpu_prefill`."""
