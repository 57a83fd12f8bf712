"""Tests of attention on many devices: eight simulated devices of this process, and two processes."""
