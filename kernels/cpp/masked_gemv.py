"""``masked_gemv`` on a CPU: a C++ template for Inductor that reads only the rows of the weight that a token keeps.

    y[t, :] = sum over k with v[t, k]^2 >= tau[k] of v[t, k] * w[k, :]        in fp32, T small, w = weight * scale

Every thread lists the kept ranks (kept_rows.py), then takes a stretch of outputs in blocks: accumulators of a block stay in the
L1 cache while kept rows stream past, eight at a time. With several tokens the rows are those that any token keeps; a token's
coefficient of a row it does not keep is zero. The result is fp32 and has no bias: what follows (bias, activation, residual, cast)
is pointwise, and Inductor fuses it into the template.

Weights are floating, int8 with a scale per row (which becomes part of the coefficient) or 4 bits with a scale per row and group
of columns (rana_fx.formats); rows must be contiguous. Quantised weights are multiplied as integers, 16 rows at a time, where the
CPU has the instructions (integers.py, also on its error), else as the floats they stand for.

Error: fp32 accumulation in a fixed order, so two runs are equal to the bit, on any number of threads.
"""

from __future__ import annotations

from typing import Any, ClassVar

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

from rana_fx.formats import GROUPS
from rana_fx.kernels.cpp import integers, kept_rows
from rana_fx.kernels.cpp.template import MAX_TOKENS, RowsTemplate, index_of

_ACCUMULATORS = 4096  # floats, over all tokens: half of a 32 KiB L1 cache

_BLOCKS = r"""
      {%- if dot %}
      constexpr int64_t MIXED = NB + {{4 * bits // 8}};  // whole chunks
      const auto mixed = floats(MIXED * T);
      {%- endif %}
      for (int64_t first = begin; first < end; first += NB) {  // not indented further
      const int64_t width = std::min(NB, end - first), places = width{{ " / 2" if packed }};
      std::fill_n(sums.get(), NB * T, 0.0f);
"""

_FLOATS = r"""
      auto add = [&](auto rows, int64_t j, int64_t from, int64_t to) {
        constexpr int R = decltype(rows)::value;
        const {{weight_type}}* w[R];
        for (int i = 0; i < R; i++) w[i] = W + row[j + i] * {{row_stride}}L + first;
        const {{weight_type}}* next[R];
        for (int i = 0; i < R; i++) next[i] = W + row[std::min(j + R + i, kept - 1)] * {{row_stride}}L + first;
        {%- if one %}
        float c[R];
        for (int i = 0; i < R; i++) c[i] = coefficient[j + i];
        {%- else %}
        const float* const c = coefficient.get() + j;
        {%- endif %}
        auto step = [&](int64_t o, int64_t n) {
          Vec x[R];
          for (int i = 0; i < R; i++) {
            x[i] = load(w[i] + o, n);
            prefetch(next[i] + o);
          }
          for (int64_t t = 0; t < T; t++) {
            float* const sum = sums.get() + t * NB + o;
            Vec a = Vec::loadu(sum, n);
            for (int i = 0; i < R; i++) a = at::vec::fmadd(x[i], Vec(c[{{"i" if one else "t * ROOM + i"}}]), a);
            a.store(sum, n);
          }
        };
        int64_t o = from;
        for (; o + VL <= to; o += VL) step(o, VL);
        if (o < to) step(o, to - o);
      };
"""

_PACKED = r"""
      // sums of even columns are in front of those of odd ones; positions are bytes
      auto add = [&](auto rows, int64_t j, int64_t from, int64_t to) {
        constexpr int R = decltype(rows)::value;
        const uint8_t* w[R];
        for (int i = 0; i < R; i++) w[i] = W + row[j + i] * {{row_stride}}L + first / 2;
        for (int64_t o = from; o < to;) {
          const int64_t g = (first + 2 * o) / GRAIN, stop = std::min((o / (GRAIN / 2) + 1) * (GRAIN / 2), to);
          float c[R * {{most}}];
          for (int i = 0; i < R; i++) {
            const int64_t k = row[j + i];
            const float scale = static_cast<float>(Scale[{{scale_index}}]);
            for (int64_t t = 0; t < T; t++) c[i * T + t] = coefficient[t * ROOM + j + i] * scale;
          }
          auto step = [&](int64_t p, int64_t n) {
            Vec even[R], odd[R];
            for (int i = 0; i < R; i++) std::tie(even[i], odd[i]) = load_pair(w[i] + p, n);
            for (int64_t t = 0; t < T; t++) {
              float* const sum = sums.get() + t * NB + p;
              Vec a = Vec::loadu(sum, n), b = Vec::loadu(sum + NB / 2, n);
              for (int i = 0; i < R; i++) {
                a = at::vec::fmadd(even[i], Vec(c[i * T + t]), a);
                b = at::vec::fmadd(odd[i], Vec(c[i * T + t]), b);
              }
              a.store(sum, n);
              b.store(sum + NB / 2, n);
            }
          };
          for (; o + VL <= stop; o += VL) step(o, VL);
          if (o < stop) step(o, stop - o);
          o = stop;
        }
      };
"""

_PRODUCTS = r"""
      {%- if dot %}
      for (int64_t j = 0; j < kept; j += 16) integers(j);
      {%- else %}
      int64_t j = 0;
      for (; j + {{rows}} <= kept; j += {{rows}}) add(std::integral_constant<int, {{rows}}>(), j, 0, places);
      for (; j < kept; j++) add(std::integral_constant<int, 1>(), j, 0, places);
      {%- endif %}
"""

_STORE = r"""
      for (int64_t t = 0; t < T; t++) {
        const float* const sum = sums.get() + t * NB;
        float* const y = target + t * N + first;
        {%- if packed %}
        for (int64_t o = 0; o < width / 2; o++) {
          y[2 * o] = sum[o];
          y[2 * o + 1] = sum[o + NB / 2];
        }
        {%- else %}
        std::copy_n(sum, width, y);
        {%- endif %}
      }
      }
"""


class MaskedGemvTemplate(RowsTemplate):
    """Inputs: v (T, K), tau (K,) fp32, weight with contiguous rows (K of them) and, where it is quantised, its scale."""

    body: ClassVar[str] = (
        "{% if dot %}" + integers.PRELUDE + integers.INTERLEAVE + "{% endif %}"
        + kept_rows.PARTS + kept_rows.LIST
        + "{% if dot and not packed %}" + integers.COEFFICIENTS + "{% endif %}"
        + _BLOCKS
        + "{% if packed %}" + _PACKED + "{% else %}" + _FLOATS + "{% endif %}"
        + "{% if dot %}" + integers.BLOCK + "{% endif %}"
        + _PRODUCTS
        + "{% if dot %}" + integers.COLLECT + "{% endif %}"
        + _STORE + kept_rows.SUM
    )  # fmt: skip

    def __init__(self, v: Any, tau: Any, weight: Any, scale: Any, layout: ir.Layout) -> None:
        tokens, columns = layout.size[0], int(layout.size[1])
        ranks = int(weight.get_size()[0])
        packed = weight.get_dtype() == torch.uint8
        most = int(tokens) if isinstance(tokens, (int, sympy.Integer)) else MAX_TOKENS
        grain = 64  # columns: whole cache lines of the result, and a whole group of a packed weight
        if packed:
            grain = next(g for g in GROUPS if -(-columns // g) == int(scale.get_size()[1]))
        share = -(-columns // grain) * grain
        inputs = {"V": v, "Tau": tau, "W": weight} | ({} if scale is None else {"Scale": scale})
        whole = integers.facts(v.get_dtype()) if scale is not None else {"dot": None}
        super().__init__(
            "rana_masked_gemv",
            inputs,
            layout,
            products=ranks * columns,
            K=ranks,
            grain=grain,
            block=min(share, _ACCUMULATORS // most // grain * grain),
            one=most == 1,
            most=most,
            rows=8,
            packed=packed,
            splits=kept_rows.splits(ranks, columns),
            vectors=most == 1 and all(int(node.get_stride()[-1]) == 1 for node in (v, tau)) and (packed or _dense(scale)),
            weight_type=DTYPE_TO_CPP[weight.get_dtype()],
            row_stride=int(weight.get_stride()[0]),
            v_index=index_of(v, "t", "k"),
            tau_index=index_of(tau, "k"),
            row_scale="" if scale is None or packed else f" * static_cast<float>(Scale[{index_of(scale, 'k')}])",
            scale_index=index_of(scale, "k", "g") if packed else "",
            scale_stride=int(scale.get_stride()[0]) if packed else 0,
            **whole,
        )


def _dense(scale: Any) -> bool:
    """Whether the scales of rows, if there are any, are neighbours in memory."""
    return scale is None or int(scale.get_stride()[0]) == 1
