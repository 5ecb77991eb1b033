"""``router`` on a CPU: a C++ template for Inductor that multiplies a few tokens with every row of a weight.

    z[t, r] = sum over d of x[t, d] * w[r, d]        in fp32, T small, w = weight * scale

Each thread reads its rows once, several side by side, and keeps one vector of sums per row and token in registers. Quantised
rows are multiplied as integers where the CPU has the instructions (integer_router.py). Else stored numbers become fp32: an int8
row is scaled when it is summed up, a 4-bit one at the end of each group of columns. The result is fp32; the cast to x's dtype,
and whatever else is pointwise, is fused into the template.

Error: fp32 accumulation in a fixed order, so two runs are equal to the bit, on any number of threads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch._inductor import ir

from rana_fx.formats import GROUPS
from rana_fx.kernels.cpp import integer_router, integers
from rana_fx.kernels.cpp.template import RowsTemplate, index_of

SUMS = 8  # vectors of sums in flight: half of what AVX2 has as registers

OPEN = r"""
  // {{marker}}
  #pragma omp parallel num_threads({{threads}})
  {
    constexpr int64_t D = {{D}}, TOKENS = {{tokens}};
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    {%- if packed %}
    constexpr int64_t HALF = D / 2, PAD = HALF + VL;  // even inputs of a token, then odd ones
    const auto x = floats(2 * PAD * TOKENS);
    for (int64_t t = 0; t < TOKENS; t++)
      for (int64_t p = 0; p < HALF; p++) {
        const int64_t d = 2 * p;
        x[2 * t * PAD + p] = static_cast<float>(X[{{x_index}}]);
        x[(2 * t + 1) * PAD + p] = static_cast<float>(X[{{x_index}} + {{x_step}}L]);
      }
    {%- else %}
    constexpr int64_t PAD = D + VL;
    const auto x = floats(PAD * TOKENS);
    for (int64_t t = 0; t < TOKENS; t++)
      for (int64_t d = 0; d < D; d++) x[t * PAD + d] = static_cast<float>(X[{{x_index}}]);
    {%- endif %}
    auto total = [](const Vec& sum) {
      alignas(64) float parts[VL];
      sum.store(parts);
      for (int64_t n = VL / 2; n > 0; n /= 2)
        for (int64_t i = 0; i < n; i++) parts[i] += parts[i + n];
      return parts[0];
    };
"""

# {{row}}: the number of row i of those from ``first`` on, {{next_row}}: R rows later; {{value}}: what becomes of its sum
FLOATS = r"""
    auto dot = [&](auto rows, int64_t first) {
      constexpr int R = decltype(rows)::value;
      Vec sum[R][TOKENS];
      for (auto& s : sum) for (auto& a : s) a = Vec(0.0f);
      auto step = [&](int64_t d, int64_t n) {
        Vec w[R];
        for (int i = 0; i < R; i++) {
          w[i] = load(W + {{row}} * {{row_stride}}L + d, n);
          prefetch(W + {{next_row}} * {{row_stride}}L + d);
        }
        for (int64_t t = 0; t < TOKENS; t++) {
          const Vec a = Vec::loadu(x.get() + t * PAD + d, n);
          for (int i = 0; i < R; i++) sum[i][t] = at::vec::fmadd(w[i], a, sum[i][t]);
        }
      };
      int64_t d = 0;
      for (; d + VL <= D; d += VL) step(d, VL);
      if (d < D) step(d, D - d);
      for (int i = 0; i < R; i++) {
        const int64_t r = {{row}};
        for (int64_t t = 0; t < TOKENS; t++) result[t * N + r] = {{value}};
      }
    };
"""

_PACKED = r"""
    auto dot = [&](auto rows, int64_t first) {
      constexpr int R = decltype(rows)::value;
      constexpr int64_t G = {{group}} / 2;
      Vec sum[R][TOKENS];
      for (auto& s : sum) for (auto& a : s) a = Vec(0.0f);
      for (int64_t g = 0; g * G < HALF; g++) {
        Vec part[R][TOKENS];
        for (auto& s : part) for (auto& a : s) a = Vec(0.0f);
        auto step = [&](int64_t p, int64_t n) {
          Vec even[R], odd[R];
          for (int i = 0; i < R; i++) std::tie(even[i], odd[i]) = load_pair(W + (first + i) * {{row_stride}}L + p, n);
          for (int64_t t = 0; t < TOKENS; t++) {
            const Vec a = Vec::loadu(x.get() + 2 * t * PAD + p, n), b = Vec::loadu(x.get() + (2 * t + 1) * PAD + p, n);
            for (int i = 0; i < R; i++)
              part[i][t] = at::vec::fmadd(odd[i], b, at::vec::fmadd(even[i], a, part[i][t]));
          }
        };
        const int64_t stop = std::min(HALF, (g + 1) * G);
        int64_t p = g * G;
        for (; p + VL <= stop; p += VL) step(p, VL);
        if (p < stop) step(p, stop - p);
        for (int i = 0; i < R; i++) {
          const int64_t r = first + i;
          const Vec scale(static_cast<float>(Scale[{{scale_index}}]));
          for (int64_t t = 0; t < TOKENS; t++) sum[i][t] = at::vec::fmadd(part[i][t], scale, sum[i][t]);
        }
      }
      for (int i = 0; i < R; i++)
        for (int64_t t = 0; t < TOKENS; t++) result[t * N + first + i] = total(sum[i][t]);
    };
"""

_CLOSE = r"""
    constexpr int64_t GRAIN = 16, grains = (N + GRAIN - 1) / GRAIN;  // whole cache lines of the result
    int64_t r = grains * thread / count * GRAIN;
    const int64_t end = std::min(N, grains * (thread + 1) / count * GRAIN);
    {%- if dot %}
    if (fits) {
      for (; r + {{rows}} <= end; r += {{rows}}) integers(std::integral_constant<int, {{rows}}>(), r);
      for (; r < end; r++) integers(std::integral_constant<int, 1>(), r);
    }
    {%- endif %}
    for (; r + {{rows}} <= end; r += {{rows}}) dot(std::integral_constant<int, {{rows}}>(), r);
    for (; r < end; r++) dot(std::integral_constant<int, 1>(), r);
  }
"""


class RouterTemplate(RowsTemplate):
    """Inputs: x (T, D), weight (R rows, contiguous) and, where it is quantised, its scale. T is a number."""

    body: ClassVar[str] = (
        "{% if dot %}" + integers.PRELUDE + "{% endif %}"
        + OPEN
        + "{% if packed %}" + _PACKED + "{% else %}" + FLOATS + "{% endif %}"
        + "{% if dot %}" + integer_router.INPUTS + integer_router.ROWS + "{% endif %}"
        + _CLOSE
    )  # fmt: skip

    def __init__(self, x: Any, weight: Any, scale: Any, layout: ir.Layout) -> None:
        tokens, rows = (int(size) for size in layout.size)
        width = int(x.get_size()[1])
        packed = weight.get_dtype() == torch.uint8
        inputs = {"X": x, "W": weight} | ({} if scale is None else {"Scale": scale})
        whole = {"dot": None} if scale is None else integers.facts(x.get_dtype())
        if whole["dot"] == "maddubs" and (width // 2 if packed else width) % 32:
            whole["dot"] = None  # rows end within a vector
        row_scale = "" if scale is None or packed else f" * static_cast<float>(Scale[{index_of(scale, 'r')}])"
        super().__init__(
            "rana_router",
            inputs,
            layout,
            products=rows * width,
            marker="rana_router",
            D=width,
            tokens=tokens,
            rows=max(1, min(4, SUMS // tokens)),
            packed=packed,
            group=next(g for g in GROUPS if -(-width // g) == int(scale.get_size()[1])) if packed else 0,
            row_stride=int(weight.get_stride()[0]),
            x_index=index_of(x, "t", "d"),
            x_step=int(x.get_stride()[1]),
            row="(first + i)",
            next_row="std::min(first + i + R, N - 1)",
            value="total(sum[i][t])" + row_scale,
            row_scale=row_scale,
            scale_index=index_of(scale, "r", "g") if packed else "",
            **whole,
        )
