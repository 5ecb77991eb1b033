"""``masked_gemv`` on a CPU: a C++ template for Inductor that reads only the rows of the weight that a token keeps.

    y[t, :] = sum over k with v[t, k]^2 >= tau[k] of v[t, k] * weight[k, :]        in fp32, T small

Every thread compacts the kept ranks once (branch-free: K steps against K * N products), then takes blocks of outputs:
accumulators of a block stay in the L1 cache while kept rows stream past, eight at a time. With several tokens the rows are
those that any token keeps; a token's coefficient of a row it does not keep is zero. The result is fp32 and has no bias:
what follows (bias, activation, residual, cast) is pointwise, and Inductor fuses it into the template's store.

Wins over a dense product as soon as rows are skipped (bench/kernels.py); the weight must be rank-major, rows contiguous.
Error: fp32 accumulation in a fixed order, so two runs on as many threads are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._inductor.lowering  # noqa: F401  # first: the modules below import each other in a circle that only it opens
from torch._inductor import ir
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.utils import parallel_num_threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 8  # beyond, masks of several tokens cover most rows and a matrix product is faster
_BLOCK = 512  # outputs: accumulators of eight tokens fill half of a 32 KiB L1 cache
_SERIAL = 1 << 16  # products: below, starting threads costs more than they save

_SOURCE = r"""
{{template.header().getvalue()}}
#include <vector>
extern "C" {{export_declaration}}
{{kernel.def_kernel(inputs=inputs, outputs=outputs)}}
{
  constexpr int64_t K = {{K}}, N = {{N}}, NB = {{block}};
  const int64_t T = {{kernel.size(gemm, 0)}};
  using W_t = {{weight_type}};
  using V_t = {{v_type}};
  using Vec = at::vec::Vectorized<float>;
  {%- if local %}
  std::vector<float> local_buffer(T * N);
  float* const result = local_buffer.data();
  float* const {{local.get_name()}} = result;
  {%- elif epilogue_nodes %}
  float* const result = G;
  {%- else %}
  float* const result = Y;
  {%- endif %}
  // rana_masked_gemv
  #pragma omp parallel num_threads({{threads}})
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    std::vector<int32_t> row(K + 1);
    std::vector<float> coefficient((K + 1) * T);
    int64_t kept = 0;
    for (int64_t k = 0; k < K; k++) {
      bool any = false;
      for (int64_t t = 0; t < T; t++) {
        const float v = static_cast<float>(V[{{v_index}}]);
        const bool keep = v * v >= static_cast<float>(Tau[{{tau_index}}]);
        coefficient[kept * T + t] = keep ? v : 0.0f;
        any |= keep;
      }
      row[kept] = static_cast<int32_t>(k);
      kept += any;  // a row nobody keeps is overwritten by the next
    }
    const int64_t blocks = (N + NB - 1) / NB, share = (blocks + count - 1) / count;
    const int64_t last = std::min(blocks, (thread + 1) * share);
    std::vector<float> sums(NB * T);
    for (int64_t b = thread * share; b < last; b++) {
      const int64_t first = b * NB, width = std::min(NB, N - first);
      std::fill(sums.begin(), sums.end(), 0.0f);
      int64_t j = 0;
      for (; j + 8 <= kept; j += 8) {
        const W_t* w[8];
        for (int i = 0; i < 8; i++) w[i] = W + static_cast<int64_t>(row[j + i]) * {{row_stride}} + first;
        for (int64_t t = 0; t < T; t++) {
          float* const sum = sums.data() + t * NB;
          float c[8];
          for (int i = 0; i < 8; i++) c[i] = coefficient[(j + i) * T + t];
          const Vec c0(c[0]), c1(c[1]), c2(c[2]), c3(c[3]), c4(c[4]), c5(c[5]), c6(c[6]), c7(c[7]);
          int64_t o = 0;
          for (; o + Vec::size() <= width; o += Vec::size()) {
            auto load = [&](const W_t* p) {
              {%- if weight_type == "float" %}
              return Vec::loadu(p + o);
              {%- else %}
              return at::vec::convert<float>(at::vec::Vectorized<W_t>::loadu(p + o, Vec::size()));
              {%- endif %}
            };
            Vec a = Vec::loadu(sum + o);
            a = at::vec::fmadd(load(w[0]), c0, a); a = at::vec::fmadd(load(w[1]), c1, a);
            a = at::vec::fmadd(load(w[2]), c2, a); a = at::vec::fmadd(load(w[3]), c3, a);
            a = at::vec::fmadd(load(w[4]), c4, a); a = at::vec::fmadd(load(w[5]), c5, a);
            a = at::vec::fmadd(load(w[6]), c6, a); a = at::vec::fmadd(load(w[7]), c7, a);
            a.store(sum + o);
          }
          for (; o < width; o++)
            for (int i = 0; i < 8; i++) sum[o] += c[i] * static_cast<float>(w[i][o]);
        }
      }
      for (; j < kept; j++) {
        const W_t* const w = W + static_cast<int64_t>(row[j]) * {{row_stride}} + first;
        for (int64_t t = 0; t < T; t++) {
          const float c = coefficient[j * T + t];
          for (int64_t o = 0; o < width; o++) sums[t * NB + o] += c * static_cast<float>(w[o]);
        }
      }
      for (int64_t t = 0; t < T; t++)
        std::copy_n(sums.data() + t * NB, width, result + t * N + first);
    }
  }
  {%- if epilogue_nodes %}
  {{kernel.store_output(y_2d, local or gemm, gemm, epilogue_nodes, offsets=("0", "0"), reindexers=reindexers)}}
  {%- endif %}
}
"""


class MaskedGemvTemplate(CppTemplate):
    """Inputs: v (T, K), tau (K,) fp32, weight (K, N) with contiguous rows. Output: (T, N) fp32, contiguous."""

    def __init__(self, inputs: Sequence[Any], layout: ir.Layout) -> None:
        ranks, outputs = (int(size) for size in inputs[2].get_size())
        threads = parallel_num_threads() if ranks * outputs >= _SERIAL else 1
        super().__init__("rana_masked_gemv", list(inputs), layout, threads)

    def render(self, **given: Any) -> str:
        """C++ source. The scheduler fuses pointwise users into any template: ignoring ``epilogue_nodes`` would leave the
        buffer they write to uninitialised."""
        v, tau, weight = self.input_nodes
        gemm: Any = given.get("template_buffer_node") or self.output_node
        epilogue_nodes: list[Any] = given.get("epilogue_nodes") or []
        y_2d, local = gemm, None
        reindexers: list[Any] = []
        outputs = {"Y": gemm}
        if epilogue_nodes:
            outputs = {"Y": epilogue_nodes[-1]}
            y_2d, reindexers = gen_2d_view_of_epilogue_buf(
                epilogue_nodes[-1], gemm, epilogue_nodes, [], [None] * len(epilogue_nodes)
            )
            if given.get("flag_template_buffer_has_other_users"):
                outputs["G"] = gemm
            else:
                layout = ir.FixedLayout(gemm.get_device(), gemm.get_dtype(), gemm.get_size(), gemm.get_stride())
                local = ir.Buffer(name="rana_local", layout=layout)
        ranks, width = weight.get_size()
        return str(
            self._template_from_string(_SOURCE).render(
                template=self,
                kernel=given["kernel"],
                inputs={"V": v, "Tau": tau, "W": weight},
                outputs=outputs,
                gemm=gemm,
                y_2d=y_2d,
                local=local,
                epilogue_nodes=epilogue_nodes,
                reindexers=reindexers,
                K=int(ranks),
                N=int(width),
                block=_BLOCK,
                threads=self.num_threads,
                weight_type=DTYPE_TO_CPP[weight.get_dtype()],
                v_type=DTYPE_TO_CPP[v.get_dtype()],
                v_index=_index(v, "t", "k"),
                tau_index=_index(tau, "k"),
                row_stride=int(weight.get_stride()[0]),
                export_declaration=get_export_declaration(),
            )
        )


def _index(node: Any, *names: str) -> str:
    """The offset of an element in a strided buffer."""
    return " + ".join(f"{name} * {int(stride)}L" for name, stride in zip(names, node.get_stride(), strict=True))
