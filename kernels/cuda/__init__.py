"""CUDA C++ kernels on tensor cores, compiled by NVRTC when they are first launched, for few tokens on an NVIDIA GPU."""
