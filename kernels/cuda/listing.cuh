// The ranks that a block multiplies.

// Lists the kept ranks of this block's slice in order; returns how many there are. Waits for the previous kernel.
DEVICE int list_ranks(const Arguments& a, char* memory, int split) {
  int* ranks = (int*)memory;
  u16* values = (u16*)(memory + AT_VALUES);
  u32* factors = (u32*)values;
  int* counts = (int*)(memory + AT_COUNTS);
  int thread = thread_index(), warp = thread / LANES, lane = thread % LANES;
  // a warp lists PER_THREAD * 32 ranks that are neighbours in the slice
  float tau[PER_THREAD], scale[PER_THREAD];
  u16 v[PER_THREAD][TOKENS <= 4 ? TOKENS : 1];
  u32 kept[PER_THREAD];
  int count = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int o = (warp * PER_THREAD + i) * LANES + lane, k = o / STEP * (STEP * SPLITS) + split * STEP + o % STEP;
    bool there = o < LISTED && k < a.K;
    tau[i] = there ? read(a.tau, k * a.tau_rank, THRESHOLD) : 0.f;
    if (BITS == 8) scale[i] = there ? read(a.scale, (u64)(u32)k * a.scale_row, SCALE) : 0.f;
  }
  if (EARLY) {
    wait_for_previous_kernel();
    start_next_kernel();
  }
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int o = (warp * PER_THREAD + i) * LANES + lane, k = o / STEP * (STEP * SPLITS) + split * STEP + o % STEP;
    bool keep = false, there = o < LISTED && k < a.K;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      u16 x = there ? ((const u16*)a.v)[t * a.v_token + k * a.v_rank] : (u16)0;
      float f = value_of(x);
      // NaN is below no threshold: it is kept
      bool mine = there && !(f * f < tau[i]);
      if (TOKENS <= 4) v[i][t] = mine ? x : (u16)0;
      keep = keep || mine;
    }
    kept[i] = ballot(keep);
    count += ones(kept[i]);
  }
  if (lane == 0) counts[warp] = count;
#if INTEGERS
  if (LISTS_FACTORS) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      u32 most = 0;
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) most = max(most, magnitude(value_of(v[i][t]) * scale[i]));
      store_largest(memory, t, most);
    }
  }
#endif
  sync_block();
#if INTEGERS
  float inverse[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) inverse[t] = LISTS_FACTORS ? fixed_point(memory, t).inverse : 0.f;
#endif
  int at = 0, total = 0;
#pragma unroll
  for (int j = 0; j < ALL_WARPS; j++) {
    at += j < warp ? counts[j] : 0;
    total += counts[j];
  }
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int o = (warp * PER_THREAD + i) * LANES + lane, k = o / STEP * (STEP * SPLITS) + split * STEP + o % STEP;
    if (kept[i] >> lane & 1) {
      int place = at + ones(kept[i] & ((1u << lane) - 1));
      ranks[place] = k;
      float factor = BITS == 8 ? scale[i] : 0.f;
      if (LISTS_POWERS) {
        // at least half of and below 1, so that products have the range of the values
        u32 exponent = bits_of_float(factor) & 0x7F800000u;
        factor *= float_of_bits((253u << 23) - exponent);
        values[TOKENS * VALUE_STRIDE + place] = rounded(float_of_bits(exponent + (1u << 23)));
      }
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        u16 x;
        if (TOKENS <= 4) {
          x = v[i][t];
        } else {
          x = ((const u16*)a.v)[t * a.v_token + k * a.v_rank];
          float f = value_of(x);
          x = f * f < tau[i] ? (u16)0 : x;
        }
#if INTEGERS
        if (LISTS_FACTORS) factors[t * LENGTH + slot_of(place)] = digits_of(value_of(x) * factor, inverse[t]);
#endif
        if (LISTS_PRODUCTS) x = rounded(value_of(x) * factor);
        if (!LISTS_FACTORS) values[t * VALUE_STRIDE + place] = x;
      }
    }
    at += ones(kept[i]);
  }
  // the last step reads whole rows of 16: rank 0 with value 0
  if (thread < STEP) {
    ranks[total + thread] = 0;
    for (int t = 0; t < TOKENS + LISTS_POWERS; t++) {
#if INTEGERS
      if (LISTS_FACTORS) factors[t * LENGTH + slot_of(total + thread)] = 0;
#endif
      if (!LISTS_FACTORS) values[t * VALUE_STRIDE + total + thread] = 0;
    }
  }
  sync_block();
  return total;
}
