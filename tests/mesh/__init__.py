"""Attention over many devices: eight of this process, simulated, and two processes."""
