"""Paged attention on a GPU: numbers checked, calls timed beside a copy of the same bytes and beside peers."""
