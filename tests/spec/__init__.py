"""Tests of what an attention means."""
