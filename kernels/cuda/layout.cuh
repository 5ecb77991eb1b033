// Sizes that follow from the constants of a compilation, where everything lies in shared memory, and how numbers are read.

constexpr int LANES = 32, STEP = 16, ROW_BYTES = 128;
constexpr int COLUMNS = ROW_BYTES * 8 / BITS;
constexpr int GROUPS = BITS == 4 ? COLUMNS / GROUP : 1;
constexpr int ALL_WARPS = SEGMENTS * WARPS, THREADS = ALL_WARPS * LANES;
// that registers must suffice for on a multiprocessor: without any number the compiler computes anew in each step what it could keep
constexpr int BLOCKS = !INTEGERS || THREADS > 512 ? 1 : 512 / THREADS;
constexpr int PER_THREAD = (LISTED + THREADS - 1) / THREADS;
constexpr int LENGTH = LISTED + STEP;
constexpr int ITEMS = GROUPS > 2 ? GROUPS / 2 : 1;  // (rank, group) pairs of a lane in a step
constexpr int SCALE_BYTES = SCALE == 0 ? 4 : 2;
constexpr int AT_ONCE = TOKENS < 4 ? TOKENS : 4;    // tokens whose sums are exchanged at a time
// of bf16 products
constexpr bool EXACT = TOKENS <= 4 || VALUE == 2;  // bf16 would leave less of products than fp16 results show
constexpr int IN_SET = EXACT ? 4 : 8, SETS = (TOKENS + IN_SET - 1) / IN_SET;

// Shared memory, in bytes from its start: the list (ranks and, in 8 bits, bf16 products: scales), the tokens' values (8 bits,
// integers: their factors), counts, largest factors, scales of all entries (4 bits, integers); then the operands of the products
// or, after them, the sums.
constexpr int round_up(int x) { return (x + 127) / 128 * 128; }
constexpr bool LISTS_FACTORS = INTEGERS && BITS == 8, LISTS_SCALES = !INTEGERS && BITS == 8;
constexpr int AT_VALUES = round_up(LENGTH * (LISTS_SCALES ? 8 : 4));
constexpr int AT_COUNTS = round_up(AT_VALUES + LENGTH * TOKENS * (LISTS_FACTORS ? 4 : 2)), AT_LARGEST = AT_COUNTS + ALL_WARPS * 4;
constexpr int AT_SCALES = round_up(AT_LARGEST + (INTEGERS ? ALL_WARPS * TOKENS * 4 : 0));
constexpr int AT_FACTORS = round_up(AT_SCALES + (INTEGERS && BITS == 4 ? SEGMENTS * LENGTH * GROUPS * SCALE_BYTES : 0));
constexpr int FACTOR_WORDS = !INTEGERS ? SETS * GROUPS * 8 * STEP / 2 : BITS == 4 ? TOKENS * GROUPS * STEP : 0;  // of a warp
// of a stage: 16 pieces of rows and, in 4 bits for bf16 products, their scales
constexpr int STAGE_SCALES = BITS == 4 && !INTEGERS ? STEP * GROUPS * SCALE_BYTES : 0, STAGE_BYTES = STEP * ROW_BYTES + STAGE_SCALES;
constexpr int AT_ROWS = round_up(AT_FACTORS + ALL_WARPS * FACTOR_WORDS * 4);
constexpr int AT_SUMS = AT_FACTORS;
constexpr int SUM_WORDS = INTEGERS ? 4 : 1;  // of an output of a warp
static_assert(SCALE_UNIT >= 4);
static_assert(AT_ROWS + ALL_WARPS * STAGES * STAGE_BYTES <= SHARED_BYTES);
static_assert(AT_SUMS + ALL_WARPS * AT_ONCE * COLUMNS * SUM_WORDS * 4 <= SHARED_BYTES);

DEVICE float read(const void* p, long long i, int dtype) {
  if (dtype == 0) return ((const float*)p)[i];
  u16 x = ((const u16*)p)[i];
  return dtype == 1 ? float_of_bits((u32)x << 16) : float_of_half(x);
}
DEVICE float value_of(u16 x) { return VALUE == 1 ? float_of_bits((u32)x << 16) : float_of_half(x); }

struct alignas(16) Four {
  u32 word[4];
};
struct alignas(8) Two {
  u32 word[2];
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
// The columns that a segment may read end here.
DEVICE int end_of(const Arguments& a, int column) { return ACTIVATION && column < a.half ? a.half : a.N; }

// What a warp works on: COLUMNS outputs from ``column`` on, steps ``first``, first + WARPS, ... of the list.
struct Share {
  const Arguments& a;
  char* memory;
  int block, warp, lane, segment, first, column, listed;

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
      float v = value_of(((const u16*)a.v)[token * a.v_token + k * a.v_rank]);
      // 0 times what is not finite is left out, as is what a token drops
      if (v == 0.f || v * v < read(a.tau, k * a.tau_rank, THRESHOLD)) continue;
      u32 byte = ((const unsigned char*)a.w)[k * a.w_row + at * BITS / 8];
      float q = BITS == 4 ? (float)(int)(at % 2 ? byte >> 4 : byte & 15) - 8.f : (float)(signed char)byte;
      sum += v * (q * read(a.scale, k * a.scale_row + (BITS == 4 ? at / GROUP : 0), SCALE));
    }
  }
  return sum;
}
