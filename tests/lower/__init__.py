"""Tests of how an attention runs, apart from its numbers."""
