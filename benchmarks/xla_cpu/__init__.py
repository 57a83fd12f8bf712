"""What the XLA lowering costs on this machine's CPU, beside READ and beside peers: ``python -m benchmarks.xla_cpu``."""
