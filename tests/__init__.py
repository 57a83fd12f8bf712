"""Tests: properties crossed with every lowering here; `spec`, `lower` and `runtime` mirror the sources."""
