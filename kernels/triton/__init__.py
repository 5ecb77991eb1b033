"""Triton kernels, for few tokens on a GPU."""
