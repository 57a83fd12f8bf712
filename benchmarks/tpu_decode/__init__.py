"""Decode kernels compiled by the real TPU compiler and modelled without a TPU: `python -m benchmarks.tpu_decode`."""
