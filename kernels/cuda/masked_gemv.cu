// y_TN = c_N + sum over k with v_Tk^2 >= tau_k of v_Tk * w_kN for a weight in 4 or 8 bits, on tensor cores, in one launch.
//
// A cluster of SPLITS blocks computes SEGMENTS * COLUMNS outputs. Block r of a cluster takes ranks in groups of 16 in turn, lists in
// shared memory those that some token keeps, with the tokens' values (0 where a token drops the rank), and its warps multiply 16
// listed ranks at a time by COLUMNS outputs: 128 bytes of each rank's row, copied to shared memory STAGES - 1 steps ahead.
//
// Unpacking is one instruction a number: a nibble q of two ranks becomes the mantissas of a pair of bf16, 128 + q, by a byte
// permutation for two ranks and one AND-XOR for each pair. They are the first operand of an m16n8k16 product; the second are
// p = value * scale of 16 ranks for 8 columns. With up to 4 tokens, and in fp16, two columns hold p rounded to bf16 and what that
// rounding left, so that products have 16 bits of mantissa; with more tokens one column holds the first alone. What 128 and the
// offset of the stored numbers add, OFFSET * sum p, is subtracted once.
//     4 bits  q = 0 ... 15 is a number plus 8                                OFFSET = 128 + 8
//     8 bits  two nibbles, 16 h + l is a number plus 128 (the sign flipped)  OFFSET = 17 * 128 + 128
// A value that is not finite would be NaN everywhere by that subtraction: then the sums of a warp are computed again, number by
// number.
//
// Sums over warps and blocks are exchanged through shared memory in a fixed order: neither partial sums in global memory nor atomics,
// and the same bits in every run.
//
// Constants of a compilation: BITS 4 or 8; TOKENS 1 ... 16; GROUP columns of a scale (4 bits: 64 or 128); SEGMENTS, WARPS (along the
// ranks), SPLITS, STAGES; LISTED ranks of a block at most, a multiple of 16; VALUE, SCALE dtypes (0 fp32, 1 bf16, 2 fp16) of v and
// y, and of scales; SCALE_UNIT bytes that scales are copied at once (4 bits: 4, 8 or 16); THRESHOLD, BIAS and RESIDUAL dtypes (-1: none); ACTIVATION 0 none, 1 silu, 2 tanh-GELU, 3 ReLU, 4 GELU;
// EARLY 1: the launch may begin before the kernel before it is done; SHARED_BYTES of dynamic shared memory.

constexpr int LANES = 32, STEP = 16, ROW_BYTES = 128;
constexpr int COLUMNS = ROW_BYTES * 8 / BITS;
constexpr int GROUPS = BITS == 4 ? COLUMNS / GROUP : 1;
constexpr bool EXACT = TOKENS <= 4 || VALUE == 2;  // bf16 would leave less of products than fp16 results show
constexpr int IN_SET = EXACT ? 4 : 8, SETS = (TOKENS + IN_SET - 1) / IN_SET;
constexpr int TILES = BITS == 4 ? 16 : 8;
constexpr float OFFSET = BITS == 4 ? 136.f : 2304.f;
constexpr int ALL_WARPS = SEGMENTS * WARPS, THREADS = ALL_WARPS * LANES;
constexpr int PER_THREAD = (LISTED + THREADS - 1) / THREADS;
constexpr int LENGTH = LISTED + STEP;
constexpr int ITEMS = GROUPS > 2 ? GROUPS / 2 : 1;  // (rank, group) pairs of a lane in a step
constexpr int SCALE_BYTES = SCALE == 0 ? 4 : 2;
constexpr int AT_ONCE = TOKENS < 4 ? TOKENS : 4;    // tokens whose sums are exchanged at a time

// shared memory, in bytes from its start: list, values, counts, then the operands of the products or, after them, the sums
constexpr int round_up(int x) { return (x + 127) / 128 * 128; }
constexpr int AT_VALUES = round_up(LENGTH * (BITS == 8 ? 8 : 4)), AT_COUNTS = round_up(AT_VALUES + LENGTH * TOKENS * 2);
constexpr int AT_FACTORS = round_up(AT_COUNTS + ALL_WARPS * 4), FACTOR_WORDS = SETS * GROUPS * 8 * STEP / 2;
// of a stage: 16 pieces of rows and, in 4 bits, their scales; in 8 bits the list has the scales, behind the ranks
constexpr int STAGE_SCALES = BITS == 4 ? STEP * GROUPS * SCALE_BYTES : 0, STAGE_BYTES = STEP * ROW_BYTES + STAGE_SCALES;
constexpr int AT_ROWS = round_up(AT_FACTORS + ALL_WARPS * FACTOR_WORDS * 4);
constexpr int AT_SUMS = AT_FACTORS;
static_assert(AT_ROWS + ALL_WARPS * STAGES * STAGE_BYTES <= SHARED_BYTES && AT_SUMS + ALL_WARPS * AT_ONCE * COLUMNS * 4 <= SHARED_BYTES);

DEVICE float read(const void* p, long long i, int dtype) {
  if (dtype == 0) return ((const float*)p)[i];
  u16 x = ((const u16*)p)[i];
  return dtype == 1 ? float_of_bits((u32)x << 16) : float_of_half(x);
}
DEVICE float value_of(u16 x) { return VALUE == 1 ? float_of_bits((u32)x << 16) : float_of_half(x); }
DEVICE bool finite(float x) { return x - x == 0.f; }
DEVICE float sigmoid(float x) {
  float e = exponential(x >= 0.f ? -x : x);
  return (x >= 0.f ? 1.f : e) / (1.f + e);
}
DEVICE float activated(float x) {
  if (ACTIVATION == 1) return x * sigmoid(x);
  if (ACTIVATION == 2) return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
  if (ACTIVATION == 3) return x < 0.f ? 0.f : x;
  if (ACTIVATION == 4) return 0.5f * x * (1.f + error_function(0.7071067811865476f * x));
  return x;
}

struct alignas(16) Four {
  u32 word[4];
};
struct Arguments {
  const char* w;
  const void *scale, *v, *tau, *bias, *residual;
  u16* y;
  int K, N, half;  // half: outputs of one half with an activation, else N
  u32 w_row, scale_row;
  long long v_token, v_rank, tau_rank, bias_column, residual_token, residual_column, y_token;
};

// The weight's column of a segment's first output. With an activation segments alternate between the halves.
DEVICE int first_column(const Arguments& a, int block, int segment) {
  if (!ACTIVATION) return (block * SEGMENTS + segment) * COLUMNS;
  return segment % 2 * a.half + (block * (SEGMENTS / 2) + segment / 2) * COLUMNS;
}

// Lists the kept ranks of this block's slice in order; returns how many there are. Waits for the previous kernel.
DEVICE int list_ranks(const Arguments& a, char* memory, int split) {
  int* ranks = (int*)memory;
  float* scales = (float*)memory + LENGTH;
  u16* values = (u16*)(memory + AT_VALUES);
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
  sync_block();
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
      if (BITS == 8) scales[place] = scale[i];
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
        values[t * LENGTH + place] = x;
      }
    }
    at += ones(kept[i]);
  }
  // the last step reads whole rows of 16: rank 0 with value 0
  if (thread < STEP) {
    ranks[total + thread] = 0;
    if (BITS == 8) scales[total + thread] = 0.f;
    for (int t = 0; t < TOKENS; t++) values[t * LENGTH + total + thread] = 0;
  }
  sync_block();
  return total;
}

// One warp's sums of COLUMNS outputs over its share of the list.
struct Sums {
  float tiles[SETS][TILES][4];
  float totals[ITEMS][TOKENS];  // of p, as the products see it, over a lane's entries
};

struct Warp {
  const Arguments& a;
  char* memory;
  u32 lane;
  int column, listed;
  u32* factors;
  char* rows;

  DEVICE const u32* ranks() { return (const u32*)memory; }
  DEVICE const u16* values() { return (const u16*)(memory + AT_VALUES); }
  // Columns that this segment may read up to.
  DEVICE int end() { return ACTIVATION && column < a.half ? a.half : a.N; }
  // Begin to copy the 16 listed ranks from ``place`` on, and to read their scales.
  template <int STAGE>
  DEVICE void fetch(int place) {
    if (place < listed) {
      u32 chunk = lane % 8, first = lane / 8 * 4;
      int from = column + (int)chunk * (16 * 8 / BITS);
      bool there = from < end();
      const char* w = a.w + (there ? (u32)from * BITS / 8 : 0);
      Four four = *(const Four*)(ranks() + place + first);
      char* to = rows + STAGE * STAGE_BYTES + first * ROW_BYTES;
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        // the swizzle lets the four ranks that a product reads at once lie in different banks
        copy<16>(to + i * ROW_BYTES + (chunk ^ 2 * i) * 16, w + (u64)four.word[i] * a.w_row, there ? 16 : 0);
      }
      if (BITS == 4) fetch_scales(place, rows + STAGE * STAGE_BYTES + STEP * ROW_BYTES);
    }
    close_copies();
  }

  // 4 bits: the scales of 16 ranks, (16, GROUPS) as they are stored; zeros beyond the last group.
  DEVICE void fetch_scales(int place, char* to) {
    constexpr int OF_RANK = GROUPS * SCALE_BYTES / SCALE_UNIT;
#pragma unroll
    for (u32 i = lane; i < STEP * OF_RANK; i += LANES) {
      u32 first = column / GROUP + i % OF_RANK * (SCALE_UNIT / SCALE_BYTES);
      int left = ((end() + GROUP - 1) / GROUP - (int)first) * SCALE_BYTES;
      int size = left < 0 ? 0 : left < SCALE_UNIT ? left : SCALE_UNIT;
      const char* from = (const char*)a.scale + ((u64)ranks()[place + i / OF_RANK] * a.scale_row + (size ? first : 0)) * SCALE_BYTES;
      copy<SCALE_UNIT>(to + i * SCALE_UNIT, from, size);
    }
  }

  // p of 16 ranks, all groups and tokens, as the second operand of the products. Entry j of the step is at place j % 4 * 4 + j / 4,
  // so that a lane's four ranks, which are 4 apart, are neighbours.
  template <int STAGE>
  DEVICE void make_factors(int place, Sums& s) {
    u32 entry = lane % 16, at = entry % 4 * 4 + entry / 4;
    u16* to = (u16*)factors + (GROUPS > 1 ? lane / 16 * 8 * STEP : 0) + at;
    const void* stored = rows + STAGE * STAGE_BYTES + STEP * ROW_BYTES;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      if (GROUPS == 1 && lane >= 16) continue;
      float scale = BITS == 8 ? ((const float*)memory)[LENGTH + place + entry]
                              : read(stored, entry * GROUPS + (GROUPS > 1 ? lane / 16 : 0) + 2 * i, SCALE);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float p = value_of(values()[t * LENGTH + place + entry]) * scale;
        u16 high = bfloat_of_float(p);
        u16* column = to + (t / IN_SET * GROUPS + 2 * i) * 8 * STEP;
        float seen = float_of_bits((u32)high << 16);
        if (EXACT) {
          u16 rest = bfloat_of_float(p - seen);
          column[t % 4 * 2 * STEP] = high;
          column[(t % 4 * 2 + 1) * STEP] = rest;
          seen += float_of_bits((u32)rest << 16);
        } else {
          column[t % 8 * STEP] = high;
        }
        s.totals[i][t] += seen;
      }
    }
  }

  template <int STAGE>
  DEVICE void multiply_rows(Sums& s) {
    u32 g = lane / 4, t = lane % 4;
    u32 b[SETS][GROUPS][2];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        const u32* from = factors + (((set * GROUPS + group) * 8 + g) * STEP + 4 * t) / 2;
        b[set][group][0] = from[0];
        b[set][group][1] = from[1];
      }
    }
    u32 b16[SETS][2];  // 8 bits: 16 p
    if (BITS == 8) {
#pragma unroll
      for (int set = 0; set < SETS; set++) {
#pragma unroll
        for (int i = 0; i < 2; i++) b16[set][i] = times_16(b[set][0][i]);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      u32 q[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 chunk = (2 * c + g / 4) ^ 2 * t;
        q[j] = *(const u32*)(rows + STAGE * STAGE_BYTES + j * 4 * ROW_BYTES + t * ROW_BYTES + chunk * 16 + g % 4 * 4);
      }
      const int group = c * GROUPS / 4;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        // 16 bits of each of two ranks: nibbles 4 h ... 4 h + 3
        u32 first = bytes_of(q[0], q[1], h ? 0x7632 : 0x5410), second = bytes_of(q[2], q[3], h ? 0x7632 : 0x5410);
        u32 x[4], y[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          // in 8 bits the upper nibble of a byte has the sign
          const u32 flip = BITS == 8 && e % 2 ? 0x43084308u : 0x43004300u;
          x[e] = and_xor(first >> 4 * e, 0x000F000Fu, flip);
          y[e] = and_xor(second >> 4 * e, 0x000F000Fu, flip);
        }
#pragma unroll
        for (int set = 0; set < SETS; set++) {
          if (BITS == 4) {
            u32 b0 = b[set][group][0], b1 = b[set][group][1];
            multiply(s.tiles[set][c * 4 + h * 2], x[0], x[1], y[0], y[1], b0, b1);
            multiply(s.tiles[set][c * 4 + h * 2 + 1], x[2], x[3], y[2], y[3], b0, b1);
          } else {
            multiply(s.tiles[set][c * 2 + h], x[0], x[2], y[0], y[2], b[set][0][0], b[set][0][1]);
            multiply(s.tiles[set][c * 2 + h], x[1], x[3], y[1], y[3], b16[set][0], b16[set][1]);
          }
        }
      }
    }
  }

  // Two bf16 times 16: exact, up to infinity.
  DEVICE static u32 times_16(u32 x) {
    float low = float_of_bits(x << 16) * 16.f, high = float_of_bits(x & 0xFFFF0000u) * 16.f;
    return bfloat_of_float(low) | (u32)bfloat_of_float(high) << 16;
  }

  template <int STAGE>
  DEVICE void step(int place, Sums& s) {
    wait_for_copies<STAGES - 2>();
    sync_warp();
    // into the stage that was multiplied in the step before
    fetch<(STAGE + STAGES - 1) % STAGES>(place + (STAGES - 1) * STEP * WARPS);
    make_factors<STAGE>(place, s);
    sync_warp();
    multiply_rows<STAGE>(s);
  }

  template <int STAGE>
  DEVICE void steps(int place, Sums& s) {
    if constexpr (STAGE < STAGES) {
      if (place < listed) {
        step<STAGE>(place, s);
        steps<STAGE + 1>(place + STEP * WARPS, s);
      }
    }
  }

  template <int STAGE>
  DEVICE void first_fetches(int place) {
    if constexpr (STAGE < STAGES - 1) {
      fetch<STAGE>(place);
      first_fetches<STAGE + 1>(place + STEP * WARPS);
    }
  }

  // The sums over the list's steps ``first``, first + WARPS, ...
  DEVICE void run(int first, Sums& s) {
    first_fetches<0>(first * STEP);
    for (int place = first * STEP; place < listed; place += STAGES * STEP * WARPS) steps<0>(place, s);
    wait_for_copies<0>();
  }

  // One output for one token over the same steps, number by number.
  DEVICE float slow_sum(int first, int output, int token) {
    float sum = 0.f;
    int at = column + output;
    if (at >= end()) return sum;
    for (int place = first * STEP; place < listed; place += STEP * WARPS) {
      for (int i = 0; i < STEP && place + i < listed; i++) {
        long long k = ranks()[place + i];
        u32 byte = ((const unsigned char*)a.w)[k * a.w_row + at * BITS / 8];
        float q = BITS == 4 ? (float)(int)(at % 2 ? byte >> 4 : byte & 15) - 8.f : (float)(signed char)byte;
        float v = value_of(values()[token * LENGTH + place + i]);
        if (v != 0.f) sum += v * (q * read(a.scale, k * a.scale_row + (BITS == 4 ? at / GROUP : 0), SCALE));
      }
    }
    return sum;
  }
};

// The sum of p over all entries, for each token and group, in every lane.
DEVICE void add_totals(Sums& s) {
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int apart = 1; apart < 16; apart *= 2) s.totals[i][t] += of_lane(s.totals[i][t], apart);
    }
  }
}

// A warp's sums for tokens ``from`` ... from + AT_ONCE - 1 to shared memory: (AT_ONCE, COLUMNS) from ``to`` on.
DEVICE void store_sums(Warp& warp, const Sums& s, float* to, int from, int first) {
  int g = (int)warp.lane / 4, t = (int)warp.lane % 4;
#pragma unroll
  for (int token = from; token < from + AT_ONCE && token < TOKENS; token++) {
    const int set = token / IN_SET;
    // exact: lane t has both columns of token t of a set; else of tokens 2 t and 2 t + 1
    bool mine = EXACT ? t == token % 4 : t == token % 8 / 2;
    bool odd = false;
    float totals[GROUPS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      totals[group] = in_lane(s.totals[group / 2][token], GROUPS > 1 ? group % 2 * 16 : 0);
      odd = odd || !finite(totals[group]);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      int c = BITS == 4 ? tile / 4 : tile / 2;
      int output = BITS == 4 ? c * 64 + g * 8 + tile % 4 * 2 : c * 32 + g * 4 + tile % 2 * 2;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const float* found = s.tiles[set][tile] + 2 * row;
        float sum = EXACT ? found[0] + found[1] : found[token % 2];
        if (mine) to[(token - from) * COLUMNS + output + row] = sum - OFFSET * totals[c * GROUPS / 4];
      }
    }
    sync_warp();
    for (int o = (int)warp.lane; odd && o < COLUMNS; o += LANES) {
      to[(token - from) * COLUMNS + o] = warp.slow_sum(first, o, token);
    }
    sync_warp();
  }
}

// Adds what the warps and the cluster's blocks have stored, and writes outputs of tokens ``from`` ... from + AT_ONCE - 1.
DEVICE void exchange(const Arguments& a, float* sums, int from, int block, int split) {
  int thread = thread_index();
  sync_block();
  for (int i = thread; i < SEGMENTS * AT_ONCE * COLUMNS; i += THREADS) {
    // warps of a segment are SEGMENTS apart
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < WARPS; j++) sum += sums[j * SEGMENTS * AT_ONCE * COLUMNS + i];
    sums[i] = sum;
  }
  if (SPLITS > 1) sync_cluster(); else sync_block();
  constexpr int OUTPUTS = (ACTIVATION ? SEGMENTS / 2 : SEGMENTS) * COLUMNS;
  constexpr int SHARE = (OUTPUTS * AT_ONCE + SPLITS - 1) / SPLITS;
  for (int i = split * SHARE + thread; i < (split + 1) * SHARE && i < OUTPUTS * AT_ONCE; i += THREADS) {
    int token = from + i / OUTPUTS, o = i % OUTPUTS, segment = o / COLUMNS * (ACTIVATION ? 2 : 1);
    int column = first_column(a, block, segment) + o % COLUMNS;
    if (token >= TOKENS || column >= (ACTIVATION ? a.half : a.N)) continue;
    float y[ACTIVATION ? 2 : 1];
#pragma unroll
    for (int part = 0; part < (ACTIVATION ? 2 : 1); part++) {
      const float* p = sums + ((segment + part) * AT_ONCE + token - from) * COLUMNS + o % COLUMNS;
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < SPLITS; r++) sum += SPLITS > 1 ? of_block(p, r) : *p;
      if (BIAS >= 0) sum += read(a.bias, (column + part * a.half) * a.bias_column, BIAS);
      y[part] = sum;
    }
    float result = ACTIVATION ? activated(y[0]) * y[ACTIVATION ? 1 : 0] : y[0];
    if (RESIDUAL >= 0) result += read(a.residual, token * a.residual_token + column * a.residual_column, RESIDUAL);
    a.y[token * a.y_token + column] = VALUE == 1 ? bfloat_of_float(result) : half_of_float(result);
  }
  // until all blocks have read, none may write the next tokens' sums or end
  if (SPLITS > 1) sync_cluster(); else sync_block();
}

KERNEL void CLUSTER(SPLITS) BOUNDS(THREADS) masked_gemv(CONSTANT Arguments a) {
  char* memory = shared_memory();
  int thread = thread_index(), warp = thread / LANES, lane = thread % LANES, segment = warp % SEGMENTS, first = warp / SEGMENTS;
  int block = block_index() / SPLITS, split = block_index() % SPLITS;
  // columns of the second operand that no token uses stay zero
  u32* factors = (u32*)(memory + AT_FACTORS) + warp * FACTOR_WORDS;
  for (int i = lane; i < FACTOR_WORDS; i += LANES) factors[i] = 0;
  int listed = list_ranks(a, memory, split);
  Sums sums = {};
  Warp mine{a, memory, (u32)lane, first_column(a, block, segment), listed, factors, memory + AT_ROWS + warp * STAGES * STAGE_BYTES};
  if (mine.column < mine.end()) mine.run(first, sums);
  add_totals(sums);
  sync_block();  // the sums lie where the operands were
  float* shared = (float*)(memory + AT_SUMS);
#pragma unroll
  for (int from = 0; from < TOKENS; from += AT_ONCE) {
    store_sums(mine, sums, shared + warp * AT_ONCE * COLUMNS, from, first);
    exchange(a, shared, from, block, split);
  }
}
