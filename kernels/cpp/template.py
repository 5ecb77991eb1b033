"""What the C++ templates share: loads of weights as fp32 from any storage, and an epilogue that users are fused into.

In: inputs by name, and C++ text that writes ``result``, a contiguous (T, N) array of floats. Out: an Inductor template whose
text sees each input as a typed pointer to its first element, ``load`` (a vector of floats from a row of weights: the
requested number of elements, then finite values) and ``load_pair`` (even and odd columns of a packed 4-bit row). The scheduler
fuses pointwise users into any template; they run over ``result`` at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch._inductor.lowering  # noqa: F401  # first: the modules below import each other in a circle that only it opens
from torch._inductor import ir
from torch._inductor.codegen.cpp import get_export_declaration
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.utils import parallel_num_threads

from rana_fx.kernels.triton.config import CPU_TOKENS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = CPU_TOKENS
SERIAL = 1 << 16  # multiply-adds: below, starting threads takes longer than they save

_SOURCE = r"""
{{template.header().getvalue()}}
#include <memory>
#include <type_traits>
#include <utility>
extern "C" {{export_declaration}}
{{kernel.def_kernel(inputs=inputs, outputs=outputs)}}
{
  using Vec = at::vec::Vectorized<float>;
  using Int = at::vec::Vectorized<int32_t>;
  constexpr int64_t VL = Vec::size();
  {%- for name, buffer, dtype, offset in pointers %}
  const {{dtype}}* const {{name}} = {{buffer}} + {{offset}};
  {%- endfor %}
  [[maybe_unused]] auto load = [](const auto* p, int64_t count) {
    using stored = std::remove_cv_t<std::remove_pointer_t<decltype(p)>>;
    if constexpr (std::is_same_v<stored, float>) return Vec::loadu(p, count);
#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
    // half of a Vectorized, which would go through memory
    if constexpr (std::is_same_v<stored, at::BFloat16> || std::is_same_v<stored, at::Half>)
      if (count == VL) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        if constexpr (std::is_same_v<stored, at::Half>) return Vec(_mm256_cvtph_ps(bits));
        else return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
      }
#endif
    if constexpr (!std::is_same_v<stored, float>) return at::vec::convert<float>(at::vec::Vectorized<stored>::loadu(p, count));
  };
  [[maybe_unused]] auto load_pair = [](const uint8_t* p, int64_t count) {
    const Int both = at::vec::convert<int32_t>(at::vec::Vectorized<uint8_t>::loadu(p, count));
#if defined(CPU_CAPABILITY_AVX512)
    // a look-up takes the low four bits of an index and leaves the rest
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const Vec low = _mm512_permutexvar_ps(both, values), high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
    return std::make_pair(low, high);
#else
    const Int low = (both & Int(15)) - Int(8), high = (both >> Int(4)) - Int(8);
    return std::make_pair(at::vec::convert<float>(low), at::vec::convert<float>(high));
#endif
  };
  // rows that are kept lie anywhere, and no processor foresees where the next ones are
  [[maybe_unused]] auto prefetch = []([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#endif
  };
  [[maybe_unused]] auto floats = [](int64_t count) { return std::unique_ptr<float[]>(new float[count]); };
  constexpr int64_t N = {{N}};
  const int64_t T = {{kernel.size(gemm, 0)}};
  {%- if local %}
  const auto buffer = floats(T * N);
  float* const result = buffer.get();
  float* const {{local.get_name()}} = result;
  {%- elif epilogue_nodes %}
  float* const result = Other;
  {%- else %}
  float* const result = Out;
  {%- endif %}
  {{body}}
  {%- if epilogue_nodes %}
  {{kernel.store_output(out_2d, local or gemm, gemm, epilogue_nodes, offsets=("0", "0"), reindexers=reindexers)}}
  {%- endif %}
}
"""


class RowsTemplate(CppTemplate):
    """A matmul of few tokens with the rows of a matrix. Output: (T, N) fp32, contiguous."""

    body: ClassVar[str]  # its text; {{...}} are the facts given at construction

    def __init__(self, name: str, inputs: Mapping[str, Any], layout: ir.Layout, *, products: int, **facts: Any) -> None:
        """``inputs``: nodes with fixed strides, by the name of their pointer. ``products``: multiply-adds of a token."""
        super().__init__(name, list(inputs.values()), layout, parallel_num_threads() if products >= SERIAL else 1)
        self._inputs = dict(inputs)
        self._facts = facts | {"threads": self.num_threads}

    def render(self, **given: Any) -> str:
        """C++ source. Ignoring ``epilogue_nodes`` would leave the buffer they write to uninitialised."""
        gemm: Any = given.get("template_buffer_node") or self.output_node
        epilogue_nodes: list[Any] = given.get("epilogue_nodes") or []
        out_2d, local = gemm, None
        reindexers: list[Any] = []
        outputs = {"Out": gemm}
        if epilogue_nodes:
            outputs = {"Out": epilogue_nodes[-1]}
            out_2d, reindexers = gen_2d_view_of_epilogue_buf(
                epilogue_nodes[-1], gemm, epilogue_nodes, [], [None] * len(epilogue_nodes)
            )
            if given.get("flag_template_buffer_has_other_users"):
                outputs["Other"] = gemm
            else:
                layout = ir.FixedLayout(gemm.get_device(), gemm.get_dtype(), gemm.get_size(), gemm.get_stride())
                local = ir.Buffer(name="rana_local", layout=layout)
        # one parameter per buffer, of which inputs may be parts
        buffers = {node.get_name(): node for node in self._inputs.values()}
        names = {buffer: f"in{index}" for index, buffer in enumerate(buffers)}
        body = self._template_from_string(self.body).render(**self._facts)
        return str(
            self._template_from_string(_SOURCE).render(
                template=self,
                kernel=given["kernel"],
                inputs={names[buffer]: node for buffer, node in buffers.items()},
                outputs=outputs,
                pointers=[
                    (name, names[node.get_name()], DTYPE_TO_CPP[node.get_dtype()], int(node.get_layout().offset))
                    for name, node in self._inputs.items()
                ],
                gemm=gemm,
                out_2d=out_2d,
                local=local,
                epilogue_nodes=epilogue_nodes,
                reindexers=reindexers,
                N=int(gemm.get_size()[1]),
                body=body,
                export_declaration=get_export_declaration(),
            )
        )


def index_of(node: Any, *names: str) -> str:
    """The C++ expression of an element's offset in a strided buffer."""
    return " + ".join(f"{name} * {int(stride)}L" for name, stride in zip(names, node.get_stride(), strict=True))
