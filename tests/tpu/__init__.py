"""Tests of the TPU kernels, on any machine: interpreted, with bugs planted, and by the TPU's own compiler."""
