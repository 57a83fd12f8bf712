"""Tests of `paged.compat`."""
