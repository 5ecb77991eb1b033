"""What a product takes, in microseconds, from the bytes it reads and the launches it makes: the choice of masked or dense.

    rows read          K * (1 - (1 - density)^T)                 T <= 4 tokens with independent masks read the union,
                                                                 more tokens that of each group of 4, from L2 if not beyond it
    masked, bytes      rows * N * bits / 8 + scales + K * (2 T + 4) + 2 * splits * T * N * 4     values, thresholds, partials
    masked, us         masked_fixed + bytes / bandwidth + finish [+ launch for anything done apart]
    finish, us         0.8 + splits * T * block_n * 4 / 110e3    the last program reads its block's partials: one SM, from L2
    dense, bytes       K * N * bits / 8 + scales
    dense, us          dense_fixed + bytes / bandwidth

Constants of the H200 are fitted to medians of CUDA-graph replays in bf16 over buffers beyond L2 (torch 2.11, Triton 3.6) for
4096 x 12288, 4096 x 22016 and 11008 x 4096: dense 27.6-48.8 us, and the best of a sweep of masked launches that leave partials,
13.0-47.8 us at 70, 50 and 0 % masked. The model is within 10 % of each. ``finish`` is an estimate from an atomic's round trip
and the 64 bytes per clock that one SM gets from L2: not measured. Constants of the H100 are the same launch costs and the
bandwidth scaled by 3.35 / 4.8 TB/s, the ratio of the data sheets: not measured. Quantised products and products of several
tokens are assumed bound by bytes: not measured.
"""

from __future__ import annotations

import dataclasses
import math

from rana_fx.kernels.config import TOKENS_AT_ONCE, cdiv, default_config


@dataclasses.dataclass(frozen=True)
class Device:
    """bytes_per_us: memory traffic in the long run. *_fixed_us: what a product takes beyond it. launch_us: one more launch.
    sm_bytes_per_us: what one SM reads from L2.
    """

    name: str
    sm_count: int
    bytes_per_us: float
    dense_fixed_us: float
    masked_fixed_us: float
    finish_fixed_us: float
    sm_bytes_per_us: float
    launch_us: float


H200 = Device(
    "H200",
    sm_count=132,
    bytes_per_us=4.25e6,
    dense_fixed_us=6.2,
    masked_fixed_us=5.7,
    finish_fixed_us=0.8,
    sm_bytes_per_us=110e3,
    launch_us=2.5,
)
H100 = dataclasses.replace(H200, name="H100", bytes_per_us=4.25e6 * 3.35 / 4.8)


def rows_read(K: int, T: int, density: float) -> float:
    """Expected rows that T tokens with independent masks read: the union of each group of up to four."""
    groups = cdiv(T, TOKENS_AT_ONCE)
    return groups * K * (1 - math.pow(1 - density, T / groups))


def weight_bytes(rows: float, N: int, bits: int, group: int = 64) -> float:
    """Stored weights and their scales (fp32) of that many rows."""
    scales = {8: 4.0, 4: 4.0 * -(-N // group)}.get(bits, 0.0)
    return rows * (N * bits / 8 + scales)


def masked_us(
    K: int, N: int, T: int, density: float, device: Device = H200, *, bits: int = 16, launches: int = 1, finished: bool = True
) -> float:
    """Time of the masked product. launches beyond the first are somebody else's; finished: partials added in the launch."""
    config = default_config(K, N, T, density, device.sm_count, bits=bits)
    traffic = weight_bytes(rows_read(K, T, density), N, bits) + K * (2 * T + 4) + 2 * config.splits * T * N * 4
    us = device.masked_fixed_us + traffic / device.bytes_per_us + (launches - 1) * device.launch_us
    if finished:
        tokens = min(T, TOKENS_AT_ONCE)
        us += device.finish_fixed_us + config.splits * tokens * min(config.block_n, N) * 4 / device.sm_bytes_per_us
    return us


def dense_us(K: int, N: int, device: Device = H200, *, bits: int = 16) -> float:
    """Time of the dense product for a few tokens, which read the weight once."""
    return device.dense_fixed_us + weight_bytes(K, N, bits) / device.bytes_per_us


def prefers_masked(K: int, N: int, T: int, density: float, device: Device = H200, *, bits: int = 16) -> bool:
    """Whether skipping rows is expected to be faster than a dense product of a weight stored alike."""
    return masked_us(K, N, T, density, device, bits=bits) < dense_us(K, N, device, bits=bits)
