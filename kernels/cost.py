"""Estimated time of masked and dense GEMVs in microseconds, from the bytes they read and the launches they need: which is faster.

    rows read          K * (1 - (1 - density)^T)                 T <= 4 tokens with independent masks read the union,
                                                                 more tokens that of each group of 4, from L2 if not beyond it
    masked, bytes      rows * N * bits / 8 + scales + K * (2 T + 4) + 2 * splits * T * N * 4     values, thresholds, partials
    masked, us         masked_fixed + bytes / bandwidth * slower (1 + more (min(T, 4) - 1))
                       slower 2.2 in 4 bits, 1.45 in 8 bits and blocks below 1024: dequantizing takes longer than reading
                       more 0.25 in blocks of 512 outputs, 0.55 in narrower ones, 2 in 8 and 4 bits: tokens are multiplied in turn
    tensor cores, us   tensor_core_fixed + more (T - 1) + bytes / bandwidth * slower, of the rows that any token keeps
                       slower 1.15 in 4 bits, else 1; more 1.3 where results have less than 8192 columns, else 0.7
    Triton router, us  dense_fixed - 2.5 in 16 bits + bytes / bandwidth, for every four tokens
    router, us         router_fixed + 0.1 (T - 1) + bytes / bandwidth    on tensor cores; in 8 and 4 bits 0.33 (T - 1)
    rows, us           dense_fixed + bytes / bandwidth * (1 + 0.55 (min(T, 4) - 1))    masked_rows: no partials, T values a row
    dense, bytes       K * N * bits / 8 + scales, in 8 and 4 bits plus 4 K N: unpacked, written and read in 16 bits
    dense, us          dense_fixed + launch + bytes / bandwidth  the launch puts the masked input into memory

Constants of the H200 are fitted to medians of CUDA-graph replays in bf16 over buffers beyond L2 (torch 2.11, Triton 3.6) of the
matmuls of Llama-2-7B at 0, 50 and 70 % masked (bench/results/kernels-h200.jsonl): within 20 % of each for one and two tokens in
16 bits, and for one in 8 and 4 bits, but for 4096 x 12288 in 8 bits, whose config is newer than its rows; within 30 % of those
of Llama-3-8B, Gemma-2B and Pythia-1.4B, which they were not fitted to (one token, 16 bits). At four tokens and more the model is
a third or more too high, where dense wins anyway. Of masked_fixed, two to three microseconds are the reduction of partials by
the last program (memory fence, counter, reading them), the rest is launch and ramp, as in a dense matmul. Constants of the H100
are the same launch costs and the bandwidth scaled by 3.35 / 4.8 TB/s, the ratio of the data sheets: not measured. Nor is
masked_rows: it has no partials, and its tokens are taken to cost what they cost narrow masked GEMVs. Constants of the kernel on
tensor cores are from sweeps of 1 to 16 tokens in 16, 8 and 4 bits with bf16 scales, of which no rows are kept (python -m
bench.kernels makes them); so are those of routers.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from rana_fx.kernels.triton.config import TOKENS_AT_ONCE, cdiv, default_config


@dataclasses.dataclass(frozen=True)
class Device:
    """bytes_per_us: memory traffic in the long run. *_fixed_us: the time of a GEMV beyond it. launch_us: one more launch.

    Between the linears of a decoded token: norm_us, pointwise_us of one kernel; attention_us: rotary embeddings, update of the
    cache and attention over some hundred keys; step_us: embedding, last norm, choice of the next token.
    """

    name: str
    sm_count: int
    bytes_per_us: float
    dense_fixed_us: float
    masked_fixed_us: float
    packed_fixed_us: float
    tensor_core_fixed_us: float
    router_fixed_us: float
    packed_router_fixed_us: float
    launch_us: float
    norm_us: float = 2.2
    pointwise_us: float = 1.6
    attention_us: float = 11.5
    step_us: float = 12.0


H200 = Device(
    "H200",
    sm_count=132,
    bytes_per_us=4.25e6,
    dense_fixed_us=4.4,
    masked_fixed_us=6.1,
    packed_fixed_us=11.0,
    tensor_core_fixed_us=5.0,
    router_fixed_us=1.5,
    packed_router_fixed_us=3.2,
    launch_us=1.8,
)
H100 = dataclasses.replace(H200, name="H100", bytes_per_us=4.25e6 * 3.35 / 4.8)


def rows_read(K: int, T: int, density: float) -> float:
    """Expected rows that T tokens with independent masks read: the union of each group of up to four."""
    groups = cdiv(T, TOKENS_AT_ONCE)
    return groups * K * (1 - math.pow(1 - density, T / groups))


def weight_bytes(rows: float, N: int, bits: int, group: int = 64, *, scale_bytes: float = 4.0) -> float:
    """Stored weights and their scales of that many rows."""
    scales = {8: scale_bytes, 4: scale_bytes * -(-N // group)}.get(bits, 0.0)
    return rows * (N * bits / 8 + scales)


def masked_us(K: int, N: int, T: int, density: float, device: Device = H200, *, bits: int = 16) -> float:
    """Time of the masked GEMV."""
    config = default_config(K, N, T, density, device.sm_count, bits=bits)
    traffic = weight_bytes(rows_read(K, T, density), N, bits) + K * (2 * T + 4) + 2 * config.splits * T * N * 4
    more = 2.0 if bits < 16 else 0.25 if config.block_n >= 512 else 0.55
    narrow = bits == 8 and config.block_n < 1024
    slower = (2.2 if bits == 4 else 1.45 if narrow else 1.0) * (1 + more * (min(T, TOKENS_AT_ONCE) - 1))
    fixed = device.packed_fixed_us if bits < 16 and not narrow else device.masked_fixed_us
    return fixed + traffic / device.bytes_per_us * slower


def tensor_core_us(K: int, N: int, T: int, density: float, device: Device = H200, *, bits: int = 4) -> float:
    """Time of the masked GEMV on tensor cores: all tokens share the rows that any of them keeps."""
    rows = K * (1 - math.pow(1 - density, T))
    # sums of more tokens are exchanged, over more blocks where results are narrow
    more = (1.3 if N < 8192 else 0.7) * (T - 1)
    return device.tensor_core_fixed_us + more + weight_bytes(rows, N, bits) / device.bytes_per_us * (1.15 if bits == 4 else 1.0)


def router_us(R: int, D: int, T: int, device: Device = H200, *, bits: int = 4) -> float:
    """Time of the router on tensor cores."""
    fixed, more = (device.router_fixed_us, 0.1) if bits >= 16 else (device.packed_router_fixed_us, 0.33)
    return fixed + more * (T - 1) + weight_bytes(R, D, bits) / device.bytes_per_us


def rows_us(N: int, K: int, T: int, density: float, device: Device = H200, *, bits: int = 16) -> float:
    """Time of ``masked_rows``: of N rows of K columns those that T tokens with independent masks keep."""
    traffic = weight_bytes(rows_read(N, T, density), K, bits) + T * (4 * N + 2 * K)
    return device.dense_fixed_us + traffic / device.bytes_per_us * (1 + 0.55 * (min(T, TOKENS_AT_ONCE) - 1))


def triton_router_us(R: int, D: int, T: int, device: Device = H200, *, bits: int = 16) -> float:
    """Time of the Triton router behind a kernel that it starts during: part of a floating weight is read before the wait."""
    groups = cdiv(T, TOKENS_AT_ONCE)
    return device.dense_fixed_us - 2.5 * (bits >= 16) + groups * weight_bytes(R, D, bits) / device.bytes_per_us


def dense_us(K: int, N: int, device: Device = H200, *, bits: int = 16, launches: int = 1) -> float:
    """Time of the dense matmul for a few tokens, which read the weight once. One in 8 or 4 bits is unpacked to 16 bits first."""
    traffic = weight_bytes(K, N, bits)
    if bits < 16:
        traffic, launches = traffic + 2 * weight_bytes(K, N, 16), launches + 1
    return device.dense_fixed_us + traffic / device.bytes_per_us + (launches - 1) * device.launch_us


def prefers_masked(K: int, N: int, T: int, density: float, device: Device = H200, *, bits: int = 16) -> bool:
    """Whether skipping rows is expected to be faster than a dense matmul of a weight stored alike."""
    return masked_us(K, N, T, density, device, bits=bits) < dense_us(K, N, device, bits=bits, launches=2)


def prefers_rows(N: int, K: int, T: int, density: float, device: Device = H200, *, bits: int = 16) -> bool:
    """Whether ``masked_rows`` is expected to be faster than the dense matmul. Both are one launch: what is pointwise in front of
    it or behind it is another one either way. Above a few tokens a matmul reads a weight as fast, and multiplies faster.
    """
    return T <= TOKENS_AT_ONCE and rows_us(N, K, T, density, device, bits=bits) < dense_us(K, N, device, bits=bits)


def prefers_rows_on_cpu(T: int, density: float, *, bits: int = 16) -> bool:
    """Whether it is on a CPU, where each of T tokens multiplies the rows that any of them keeps, and a matmul in 16 bits has
    instructions of its own: up to 6 times the weight in 32 bits, 1.6 times in 16 (2048 x 5632 on one core of an AMD EPYC, 1 to 8
    tokens, densities 0.2 to 0.9: up to there the template was faster or within a tenth, beyond it not faster).
    """
    return T * (1 - math.pow(1 - density, T)) <= (6.0 if bits >= 32 else 1.6)


def nearest(device: torch.device) -> Device:
    """The measured device most like a CUDA device, with its number of multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return dataclasses.replace(H100 if "H100" in properties.name else H200, sm_count=properties.multi_processor_count)
