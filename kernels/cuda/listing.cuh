// The ranks that a block multiplies, and their values, with NORM after the norm.

// The ranks that a thread lists, and what is known of them before the values are: warps list PER_THREAD * 32 neighbours of the slice.
struct Thresholds {
  const Arguments& a;
  int split;
  float tau[PER_THREAD], scale[PER_THREAD], gain[PER_THREAD];

  DEVICE Thresholds(const Arguments& a, int split) : a(a), split(split) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      tau[i] = there(i) ? read(a.tau, rank(i) * a.tau_rank, THRESHOLD) : 0.f;
      if (BITS == 8) scale[i] = there(i) ? read(a.scale, (u64)(u32)rank(i) * a.scale_row, SCALE) : 0.f;
      if (NORM) gain[i] = there(i) ? gain_of(a, rank(i)) : 0.f;
    }
  }
  // Place in the slice of this thread's i-th rank, the rank, and whether there is one: those that are not are the last places.
  DEVICE int place(int i) const { return (thread_index() / LANES * PER_THREAD + i) * LANES + thread_index() % LANES; }
  DEVICE int rank(int i) const { return place(i) / STEP * (STEP * SPLITS) + split * STEP + place(i) % STEP; }
  DEVICE bool there(int i) const { return place(i) < LISTED && rank(i) < a.K; }
};

// Where no threshold of the slice can drop a rank, lists all of them, and returns how many; else 0. Reads no values.
DEVICE int list_all(const Thresholds& thresholds, char* memory) {
  int* counts = (int*)(memory + AT_COUNTS);
  int thread = thread_index(), count = 0;
  bool all = true;
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    // no square is below 0, nor below NaN
    all = all && !(thresholds.tau[i] > 0.f);
    count += ones(ballot(thresholds.there(i)));
  }
  if (ballot(!all)) count = -LISTED;
  if (thread % LANES == 0) counts[thread / LANES] = count;
  sync_block();
  int total = 0;
#pragma unroll
  for (int j = 0; j < ALL_WARPS; j++) total += counts[j];
  if (total > 0) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      if (thresholds.there(i)) ((int*)memory)[thresholds.place(i)] = thresholds.rank(i);
    }
    if (thread < STEP) ((int*)memory)[total + thread] = 0;
  }
  sync_block();
  return total > 0 ? total : 0;
}

// 1 / sqrt(mean x^2 + eps) of each token: every block reads all of x, which is shorter than a wait for the others of its cluster.
// All threads of the block call it. Sums are in one order, so that all blocks have the same bits.
#if NORM
static_assert(TOKENS <= 4);
DEVICE void find_factors(const Arguments& a, char* memory, float (&factors)[TOKENS]) {
  constexpr int CHUNK = WIDE ? 8 : 1, MINE = (LISTED * SPLITS / CHUNK + THREADS - 1) / THREADS;
  // values are listed there after a barrier
  float* squares = (float*)(memory + AT_VALUES);
  static_assert(ALL_WARPS * 4 <= VALUE_STRIDE * VALUE_BYTES);
  int thread = thread_index();
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      int k = (i * THREADS + thread) * CHUNK;
      const u16* from = (const u16*)a.v + t * a.v_token + k * a.v_rank;
      if (WIDE && k + CHUNK <= a.K) {
        Four x = *(const Four*)from;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          float number = value_of((u16)(x.word[j / 2] >> j % 2 * 16));
          sum += number * number;
        }
      } else {
        for (int j = 0; j < CHUNK && k + j < a.K; j++) {
          float number = value_of(from[j * a.v_rank]);
          sum += number * number;
        }
      }
    }
    sum = sum_in_warp(sum);
    if (thread % LANES == 0) squares[t * ALL_WARPS + thread / LANES] = sum;
  }
  sync_block();
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < ALL_WARPS; j++) sum += squares[t * ALL_WARPS + j];
    factors[t] = inverse_root(sum / a.K + a.eps);
  }
}
#endif

// Lists the kept ranks of this block's slice in order; returns how many there are. Waits for the previous kernel.
DEVICE int list_ranks(const Thresholds& thresholds, Share& share) {
  const Arguments& a = thresholds.a;
  char* memory = share.memory;
  const float(&tau)[PER_THREAD] = thresholds.tau;
  int* ranks = (int*)memory;
  u16* values = (u16*)(memory + AT_VALUES);
  u32* factors = (u32*)values;
  int* counts = (int*)(memory + AT_COUNTS);
  int thread = thread_index(), warp = thread / LANES, lane = thread % LANES;
  u16 v[PER_THREAD][TOKENS <= 4 ? TOKENS : 1];
  u32 kept[PER_THREAD];
  int count = 0;
  if (EARLY) {
    wait_for_previous_kernel();
    start_next_kernel();
  }
#if NORM
  // read before the barrier in find_factors
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) v[i][t] = thresholds.there(i) ? value_at(a, t, thresholds.rank(i)) : (u16)0;
  }
  find_factors(a, memory, share.factors_of_norm);
#endif
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int k = thresholds.rank(i);
    bool keep = false, there = thresholds.there(i);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#if NORM
      u16 x = normed(v[i][t], share.factors_of_norm[t], thresholds.gain[i]);
#else
      u16 x = there ? value_at(a, t, k) : (u16)0;
#endif
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
      for (int i = 0; i < PER_THREAD; i++) most = max(most, magnitude(value_of(v[i][t]) * thresholds.scale[i]));
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
    int k = thresholds.rank(i);
    if (kept[i] >> lane & 1) {
      int place = at + ones(kept[i] & ((1u << lane) - 1));
      ranks[place] = k;
      float factor = BITS == 8 ? thresholds.scale[i] : 0.f;
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
          x = value_at(a, t, k);
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
