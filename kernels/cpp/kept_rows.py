"""The kept rows of ``masked_gemv`` on a CPU: which thread multiplies which part, and their list. C++ text for ``masked_gemv.py``.

Ranks are in SPLITS parts, which depend on sizes alone, and columns in grains: threads take equal stretches of (part, grain).
Where outputs are few, two parts leave whole rows to each thread, and a list of half of the ranks; sums of a part are added at the
end, in order. A thread lists the kept rows of its part once, 16 ranks at a time where AVX-512 compresses a vector. The number
of listed rows is made a multiple of 16 by rows with coefficient zero where products take 16 at a time.
"""

from __future__ import annotations

_FEW_OUTPUTS = 4096  # one more pass over them costs less than half rows and a list of all ranks in every thread
_RANKS = 256


def splits(ranks: int, columns: int) -> int:
    """Parts of the ranks."""
    return 2 if columns <= _FEW_OUTPUTS and ranks >= _RANKS else 1


PARTS = r"""
  // rana_masked_gemv
  constexpr int64_t K = {{K}}, GRAIN = {{grain}}, NB = {{block}}, SPLITS = {{splits}};
  constexpr int64_t PART = (K + 16 * SPLITS - 1) / (16 * SPLITS) * 16, ROOM = PART + 32;  // ranks of a part
  constexpr int64_t grains = (N + GRAIN - 1) / GRAIN;
  {%- if splits > 1 %}
  const auto parts = floats(SPLITS * T * N);
  {%- endif %}
  #pragma omp parallel num_threads({{threads}})
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    const std::unique_ptr<int32_t[]> row(new int32_t[ROOM]);
    const auto coefficient = floats(ROOM * T);  // of a token, one after another
    const auto sums = floats(NB * T + VL);
    for (int64_t part = 0; part < SPLITS; part++) {
      auto bound = [&](int64_t i) {
        return std::min(N, std::clamp<int64_t>(SPLITS * grains * i / count - part * grains, 0, grains) * GRAIN);
      };
      const int64_t begin = bound(thread), end = bound(thread + 1);
      if (begin >= end) continue;
      float* const target = {{"parts.get() + part * T * N" if splits > 1 else "result"}};
      int64_t kept = 0, k = std::min(K, part * PART);
      const int64_t last = std::min(K, k + PART);
"""

LIST = r"""
      {%- if vectors %}
#if defined(CPU_CAPABILITY_AVX512)
      for (; k < last; k += 16) {
        const int64_t n = std::min<int64_t>(16, last - k);
        const Vec v = load(V + k, n);
        const __mmask16 present = static_cast<__mmask16>((1u << n) - 1);
        const __mmask16 keep = present & ~_mm512_cmp_ps_mask(v * v, load(Tau + k, n), _CMP_LT_OQ);  // NaN: kept
        // to a register, then to memory: compressing into memory is slow on some processors
        {%- if row_scale %}
        const Vec c = v * load(Scale + k, n);
        {%- else %}
        const Vec c = v;
        {%- endif %}
        _mm512_storeu_ps(coefficient.get() + kept, _mm512_maskz_compress_ps(keep, c));
        const __m512i numbers = _mm512_add_epi32(
            _mm512_set1_epi32(static_cast<int32_t>(k)), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        _mm512_storeu_si512(row.get() + kept, _mm512_maskz_compress_epi32(keep, numbers));
        kept += __builtin_popcount(keep);
      }
#endif
      {%- endif %}
      for (; k < last; k++) {
        bool any = false;
        for (int64_t t = 0; t < T; t++) {
          const float v = static_cast<float>(V[{{v_index}}]);
          const bool keep = !(v * v < Tau[{{tau_index}}]);  // NaN is below no threshold: kept, as in the dense model
          coefficient[t * ROOM + kept] = keep ? v{{row_scale}} : 0.0f;
          any |= keep;
        }
        row[kept] = static_cast<int32_t>(k);
        kept += any;  // a row nobody keeps is overwritten by the next
      }
      {%- if dot %}
      if (kept)
        for (; kept % 16; kept++) {
          row[kept] = row[kept - 1];
          for (int64_t t = 0; t < T; t++) coefficient[t * ROOM + kept] = 0.0f;
        }
      {%- endif %}
"""

SUM = r"""
    }
    {%- if splits > 1 %}
    #pragma omp barrier
    for (int64_t t = 0; t < T; t++) {
      int64_t n = grains * thread / count * GRAIN;
      const int64_t end = std::min(N, grains * (thread + 1) / count * GRAIN);
      const float* const part = parts.get() + t * N;
      for (; n + VL <= end; n += VL) (Vec::loadu(part + n) + Vec::loadu(part + T * N + n)).store(result + t * N + n);
      for (; n < end; n++) result[t * N + n] = part[n] + part[T * N + n];
    }
    {%- endif %}
  }
"""
