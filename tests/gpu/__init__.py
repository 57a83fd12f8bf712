"""Tests of the kernel for GPUs: interpreted, compiled for a GPU that need not be there, and read as machine code."""
