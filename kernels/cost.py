"""What a product takes, in microseconds, from the bytes it reads and the launches it makes: the choice of masked or dense.

    rows read          K * (1 - (1 - density)^T)                 T tokens with independent masks read the union
    masked, bytes      rows * N * bits / 8 + scales + K * (2 T + 4) + 2 * splits * T * N * 4     values, thresholds, partials
    masked, us         masked_fixed + bytes / bandwidth [+ launch if something else must list the ranks]
    dense, bytes       K * N * bits / 8 + scales
    dense, us          dense_fixed + bytes / bandwidth

Constants of the H200 are fitted to medians of CUDA-graph replays in bf16 over buffers beyond L2 (torch 2.11, Triton 3.6): dense
27.5-47.2 us and a one-launch gathering product at 50 and 70 % masked 14.4-28.5 us, for 4096 x 12288, 4096 x 22016 and
11008 x 4096; the model is within 10 % of each. Those of the H100 are the same launch costs and the bandwidth scaled by
3.35 / 4.8 TB/s, the ratio of the data sheets: not measured. Quantised products are assumed bound by bytes, too: not measured.
"""

from __future__ import annotations

import dataclasses

from rana_fx.kernels.config import default_config


@dataclasses.dataclass(frozen=True)
class Device:
    """bytes_per_us: memory traffic in the long run. *_fixed_us: what a product takes beyond it. launch_us: one more launch."""

    name: str
    sm_count: int
    bytes_per_us: float
    dense_fixed_us: float
    masked_fixed_us: float
    launch_us: float


H200 = Device("H200", sm_count=132, bytes_per_us=4.25e6, dense_fixed_us=6.2, masked_fixed_us=7.3, launch_us=2.5)
H100 = dataclasses.replace(H200, name="H100", bytes_per_us=4.25e6 * 3.35 / 4.8)


def rows_read(K: int, T: int, density: float) -> float:
    """Expected rows of the union of T independent masks."""
    return K * (1 - (1 - density) ** T)


def weight_bytes(rows: float, N: int, bits: int, group: int = 64) -> float:
    """Stored weights and their scales (fp32) of that many rows."""
    scales = {8: 4.0, 4: 4.0 * -(-N // group)}.get(bits, 0.0)
    return rows * (N * bits / 8 + scales)


def masked_us(K: int, N: int, T: int, density: float, device: Device = H200, *, bits: int = 16, launches: int = 1) -> float:
    """Time of the masked product; launches beyond the first are somebody else's (a list of ranks made apart, say)."""
    splits = default_config(K, N, T, density, device.sm_count, bytes_per_weight=bits / 8).splits
    traffic = weight_bytes(rows_read(K, T, density), N, bits) + K * (2 * T + 4)
    if splits > 1:
        traffic += 2 * splits * T * N * 4
    return device.masked_fixed_us + traffic / device.bytes_per_us + (launches - 1) * device.launch_us


def dense_us(K: int, N: int, device: Device = H200, *, bits: int = 16) -> float:
    """Time of the dense product for a few tokens, which read the weight once."""
    return device.dense_fixed_us + weight_bytes(K, N, bits) / device.bytes_per_us


def prefers_masked(K: int, N: int, T: int, density: float, device: Device = H200, *, bits: int = 16) -> bool:
    """Whether skipping rows is expected to be faster than a dense product of a weight stored alike."""
    return masked_us(K, N, T, density, device, bits=bits) < dense_us(K, N, device, bits=bits)
