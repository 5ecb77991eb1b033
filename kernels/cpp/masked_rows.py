"""``masked_rows`` on a CPU: a C++ template for Inductor that multiplies a few tokens with the rows that one of them keeps.

    h[t, n] = a[t, n] * (bias[n] + sum over k of x[t, k] * w[n, k])  where a[t, n] is not zero, else 0      in fp32, T small

Every thread lists the kept rows once (N steps against N * K products), writes the zeros of its stretch of rows and multiplies its
share of the list as the router does (router.py). Shares are equal however the kept rows lie. The result is fp32; the cast to
x's dtype, and whatever else is pointwise, is fused into the template.

Error: fp32 accumulation in a fixed order, so two runs are equal to the bit, on any number of threads.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch._inductor import ir

from rana_fx.kernels.cpp.router import FLOATS, OPEN, SUMS
from rana_fx.kernels.cpp.template import RowsTemplate, index_of

_LIST = r"""
    const std::unique_ptr<int32_t[]> listed(new int32_t[N + 1]);
    const int64_t begin = N * thread / count, end = N * (thread + 1) / count;
    int64_t kept = 0;
    for (int64_t r = 0; r < N; r++) {
      bool any = false;
      for (int64_t t = 0; t < TOKENS; t++) any |= static_cast<float>(A[{{a_index}}]) != 0.0f;
      listed[kept] = static_cast<int32_t>(r);
      kept += any;  // a row nobody keeps is overwritten by the next
      if (!any && begin <= r && r < end)
        for (int64_t t = 0; t < TOKENS; t++) result[t * N + r] = 0.0f;
    }
    auto gated = [&](int64_t t, int64_t r, float up) {
      const float a = static_cast<float>(A[{{a_index}}]);
      return a != 0.0f ? a * (up{{bias}}) : 0.0f;
    };
"""

_CLOSE = r"""
    int64_t j = kept * thread / count;
    const int64_t last = kept * (thread + 1) / count;
    for (; j + {{rows}} <= last; j += {{rows}}) dot(std::integral_constant<int, {{rows}}>(), j);
    for (; j < last; j++) dot(std::integral_constant<int, 1>(), j);
  }
"""


class MaskedRowsTemplate(RowsTemplate):
    """Inputs: x (T, K), a (T, N), floating weight (N rows, contiguous) and, where there is one, bias (N,). T is a number."""

    body: ClassVar[str] = OPEN + _LIST + FLOATS + _CLOSE

    def __init__(self, x: Any, a: Any, weight: Any, bias: Any, layout: ir.Layout) -> None:
        tokens, columns = (int(size) for size in layout.size)
        width = int(x.get_size()[1])
        inputs = {"X": x, "A": a, "W": weight} | ({} if bias is None else {"Bias": bias})
        super().__init__(
            "rana_masked_rows",
            inputs,
            layout,
            products=columns * width,
            marker="rana_masked_rows",
            D=width,
            tokens=tokens,
            rows=max(1, min(4, SUMS // tokens)),
            packed=False,
            row="listed[first + i]",
            next_row="listed[std::min(first + i + R, kept - 1)]",
            value="gated(t, r, total(sum[i][t]))",
            row_stride=int(weight.get_stride()[0]),
            x_index=index_of(x, "t", "d"),
            a_index=index_of(a, "t", "r"),
            bias="" if bias is None else f" + static_cast<float>(Bias[{index_of(bias, 'r')}])",
        )
