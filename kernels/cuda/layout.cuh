// Sizes that follow from the constants of a compilation, where everything lies in shared memory, and how numbers are read.

constexpr int LANES = 32, STEP = 16, ROW_BYTES = 128;
constexpr int COLUMNS = ROW_BYTES * 8 / BITS;
constexpr int GROUPS = BITS == 4 ? COLUMNS / GROUP : 1;
constexpr int ALL_WARPS = SEGMENTS * WARPS, THREADS = ALL_WARPS * LANES;
// that registers must suffice for on a multiprocessor: without any number the compiler computes anew in each step what it could keep.
// Above 8 tokens a thread has 128 sums: all registers that it can have.
constexpr int BLOCKS = TOKENS > 8 || THREADS > 512 ? 1 : 512 / THREADS;
constexpr int PER_THREAD = (LISTED + THREADS - 1) / THREADS;
constexpr int LENGTH = LISTED + STEP;
constexpr int ITEMS = GROUPS > 2 ? GROUPS / 2 : 1;  // (rank, group) pairs of a lane in a step
constexpr int SCALE_BYTES = SCALE == 0 ? 4 : 2;
constexpr int AT_ONCE = TOKENS < 8 ? TOKENS : 8;    // tokens whose sums are exchanged at a time

// Shared memory, in bytes from its start: the list (ranks), the tokens' values (8 bits: times scales; of integers as fixed-point
// numbers, of fp16 with powers of two behind them), counts, largest factors, scales of all entries (4 bits, integers); then the
// operands of the products or, after them, the sums.
constexpr int round_up(int x) { return (x + 127) / 128 * 128; }
constexpr bool LISTS_FACTORS = INTEGERS && BITS == 8;
constexpr bool LISTS_PRODUCTS = !INTEGERS && BITS == 8, LISTS_POWERS = LISTS_PRODUCTS && VALUE == 2;
// from a token's values to the next one's: floats are read of 8 tokens at once, from different banks
constexpr int VALUE_STRIDE = INTEGERS ? LENGTH : LENGTH + 8;
constexpr int AT_VALUES = round_up(LENGTH * 4), VALUE_BYTES = LISTS_FACTORS ? 4 : 2;
constexpr int AT_COUNTS = round_up(AT_VALUES + VALUE_STRIDE * (TOKENS + LISTS_POWERS) * VALUE_BYTES), AT_LARGEST = AT_COUNTS + ALL_WARPS * 4;
constexpr int AT_SCALES = round_up(AT_LARGEST + (INTEGERS ? ALL_WARPS * TOKENS * 4 : 0));
constexpr int AT_FACTORS = round_up(AT_SCALES + (INTEGERS && BITS == 4 ? SEGMENTS * LENGTH * GROUPS * SCALE_BYTES : 0));
constexpr int FACTOR_WORDS = INTEGERS && BITS == 4 ? TOKENS * GROUPS * STEP : 0;  // of a warp
// of a stage: 16 pieces of rows and, in 4 bits for products of floats, their scales
constexpr int STAGE_SCALES = BITS == 4 && !INTEGERS ? STEP * GROUPS * SCALE_BYTES : 0, STAGE_BYTES = STEP * ROW_BYTES + STAGE_SCALES;
constexpr int AT_ROWS = round_up(AT_FACTORS + ALL_WARPS * FACTOR_WORDS * 4);
constexpr int AT_SUMS = AT_FACTORS;
constexpr int SUM_WORDS = INTEGERS ? 4 : 1;  // of an output of a warp
static_assert(SCALE_UNIT >= 4);
static_assert(AT_ROWS + ALL_WARPS * STAGES * STAGE_BYTES <= SHARED_BYTES);
static_assert(AT_SUMS + ALL_WARPS * AT_ONCE * COLUMNS * SUM_WORDS * 4 <= SHARED_BYTES);

// Where a warp stores the sum of a column, for the token-th of those at once: of floats, lanes store pairs of columns (4 bits: 4 apart,
// 8 bits: 2) or single columns (16 bits) of tokens t / 2, and half a warp those of 4 tokens to different banks.
DEVICE int place_of_sum(int column, int token) {
  return INTEGERS ? column : column ^ (token / 2 % 2 * (BITS == 4 ? 2 : 8) + token / 4 % 2 * 16);
}

DEVICE float widened(u16 x, int dtype) { return dtype == 1 ? float_of_bits((u32)x << 16) : float_of_half(x); }
DEVICE float read(const void* p, long long i, int dtype) {
  return dtype == 0 ? ((const float*)p)[i] : widened(((const u16*)p)[i], dtype);
}
DEVICE float value_of(u16 x) { return widened(x, VALUE); }
DEVICE u16 rounded(float x) { return VALUE == 1 ? bfloat_of_float(x) : half_of_float(x); }

struct alignas(16) Four {
  u32 word[4];
};
struct alignas(8) Two {
  u32 word[2];
};
struct Arguments {
  const char* w;
  const void *scale, *v, *tau, *bias, *residual, *gain;
  u16* y;
  int K, N, half;  // half: outputs of one half with an activation, else N
  u32 w_row, scale_row;
  long long v_token, v_rank, tau_rank, bias_column, residual_token, residual_column, gain_rank, y_token;
  float eps, offset;
};
// Of several weights each has its own thresholds and results; clusters of the i-th end before ``ends[i]``.
struct Parts {
  Arguments of[WEIGHTS];
  int ends[WEIGHTS];
};

DEVICE u16 value_at(const Arguments& a, int token, long long k) { return ((const u16*)a.v)[token * a.v_token + k * a.v_rank]; }
// What a rank of a normed token is multiplied by: rounded once, as the normed input of a dense matmul is.
DEVICE float gain_of(const Arguments& a, long long k) { return GAIN < 0 ? 1.f : read(a.gain, k * a.gain_rank, GAIN) + a.offset; }
DEVICE u16 normed(u16 x, float factor, float gain) { return rounded(value_of(x) * factor * gain); }

// The weight's column of a segment's first output. With an activation segments alternate between the halves.
DEVICE int first_column(const Arguments& a, int block, int segment) {
  if (!ACTIVATION) return (block * SEGMENTS + segment) * COLUMNS;
  return segment % 2 * a.half + (block * (SEGMENTS / 2) + segment / 2) * COLUMNS;
}
// The columns that a segment may read end here.
DEVICE int end_of(const Arguments& a, int column) { return ACTIVATION && column < a.half ? a.half : a.N; }

// What a warp works on: COLUMNS outputs from ``column`` on, steps ``first``, first + WARPS, ... of the list.
struct Share {
  const Arguments& a;
  char* memory;
  int block, warp, lane, segment, first, column, listed;
  float factors_of_norm[NORM ? TOKENS : 1];

  DEVICE const u32* ranks() const { return (const u32*)memory; }
  DEVICE const u16* values() const { return (const u16*)(memory + AT_VALUES); }
  DEVICE int end() const { return end_of(a, column); }
  DEVICE u32* factors() const { return (u32*)(memory + AT_FACTORS) + warp * FACTOR_WORDS; }
  DEVICE char* rows() const { return memory + AT_ROWS + warp * STAGES * STAGE_BYTES; }
};

// 4 bits: begin to copy the scales of an entry that a warp needs, the ``part``-th SCALE_UNIT bytes; zeros beyond the last group, and
// for an entry that is not there.
DEVICE void copy_scales(const Share& share, void* to, int place, u32 part, bool there = true) {
  u32 first = share.column / GROUP + part * (SCALE_UNIT / SCALE_BYTES);
  int left = ((share.end() + GROUP - 1) / GROUP - (int)first) * SCALE_BYTES;
  int size = left < 0 || !there ? 0 : left < SCALE_UNIT ? left : SCALE_UNIT;
  const char* from = (const char*)share.a.scale + ((u64)share.ranks()[place] * share.a.scale_row + (size ? first : 0)) * SCALE_BYTES;
  copy<SCALE_UNIT>(to, from, size);
}

// Column ``at`` for one token over steps ``first``, first + apart, ... of the list, number by number: for values that are not finite.
DEVICE float slow_sum(const Share& share, int first, int apart, int at, int token) {
  const Arguments& a = share.a;
  float sum = 0.f;
  for (int place = first * STEP; place < share.listed; place += STEP * apart) {
    for (int i = 0; i < STEP && place + i < share.listed; i++) {
      long long k = share.ranks()[place + i];
      u16 x = value_at(a, token, k);
      float v = value_of(NORM ? normed(x, share.factors_of_norm[NORM ? token : 0], gain_of(a, k)) : x);
      // 0 times what is not finite is left out, as is what a token drops
      if (v == 0.f || v * v < read(a.tau, k * a.tau_rank, THRESHOLD)) continue;
      u32 byte = ((const unsigned char*)a.w)[k * a.w_row + at * BITS / 8];
      float q = BITS == 4 ? (float)(int)(at % 2 ? byte >> 4 : byte & 15) - 8.f : (float)(signed char)byte;
      sum += v * (q * read(a.scale, k * a.scale_row + (BITS == 4 ? at / GROUP : 0), SCALE));
    }
  }
  return sum;
}
