"""Tests of `paged.pictures`."""
