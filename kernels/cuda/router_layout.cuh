// Sizes that follow from the constants of a compilation of router.cu, where everything lies in shared memory, and how numbers are read.

constexpr int LANES = 32, THREADS = WARPS * LANES;
// Of a row a lane reads READ bytes at once and four lanes a unit, which never has columns of two groups of scales.
constexpr int READ = BITS == 4 && GROUP == 64 ? 8 : 16, WORDS = READ / 4;
constexpr int NUMBERS = READ * 8 / BITS, UNIT = 4 * NUMBERS;
constexpr int UNITS = (COLUMNS + UNIT - 1) / UNIT;
constexpr int PART = (UNITS + SPLITS - 1) / SPLITS;  // units of a block

// Products have 16 rows. Where a block has 8 the upper ones are the same rows in the next unit of columns, and of the 8 tokens of a
// product the upper four are the lower ones in that unit: of its sums only those of one unit with itself are used.
constexpr bool PAIRED = ROWS == 8;
static_assert(!PAIRED || TOKENS <= 4);
constexpr int TURN_UNITS = PAIRED ? 2 : 1;  // of a warp, which takes them in turn with the other warps
constexpr int TURNS = (PART + WARPS * TURN_UNITS - 1) / (WARPS * TURN_UNITS);
constexpr bool WHOLE = COLUMNS % (UNIT * SPLITS * WARPS * TURN_UNITS) == 0;  // no lane ever reads beyond the row
constexpr int TILES = (ROWS + 15) / 16;  // of 16 rows
constexpr int SETS = (TOKENS + 7) / 8;  // of 8 tokens
constexpr int CHAINS = TILES * SETS > 1 ? 1 : 2;  // sums of their own for neighbouring products, which else would wait for each other
// Turns whose weights are in registers at a time. AHEAD of all, nothing is read in the loop.
constexpr int TURN_WORDS = TILES * 2 * WORDS;
constexpr int AHEAD = TURNS * TURN_WORDS <= HELD ? TURNS : HELD < TURN_WORDS ? 1 : HELD / TURN_WORDS;
// that registers must suffice for on a multiprocessor: 128 for a thread
constexpr int BLOCKS = THREADS >= 512 || TOKENS > 8 ? 1 : 512 / THREADS;

constexpr int SCALE_BYTES = SCALE == 0 ? 4 : 2;
// fp16 may not hold x * gain of what is not normalised
constexpr bool NORM_FIRST = NORM && GAIN >= 0 && VALUE == 2;
constexpr float NUMBER_UNIT = BITS == 16 ? 1.f : VALUE == 1 ? 64.f : 512.f;  // of the sums of products: router_numbers.cuh

// Shared memory, in bytes from its start: x in the order of products, a piece of CHUNKS times 8 numbers for each token; the gain of
// these columns (fp32); scales of the block's rows (4 bits: as stored, zeros behind the last; 8 bits: fp32); sums of squares (TOKENS, WARPS),
// factors of the norm (TOKENS,) and sums of products (SUMS, TOKENS, ROWS).
constexpr int round_up(int x) { return (x + 127) / 128 * 128; }
constexpr int TAKEN = TURNS * TURN_UNITS * WARPS;  // units, the last of which may have no columns
constexpr int CHUNKS = TAKEN * (UNIT / 8);
// an odd multiple of 64: chunks of two tokens that are read at once lie in different banks
constexpr int TOKEN_BYTES = CHUNKS * 16 + (CHUNKS % 8 == 0 ? 64 : 0);
constexpr int SCALE_CHUNKS = (TAKEN * SCALE_BYTES + 15) / 16;  // of a row
// an odd multiple of 16: scales of 8 rows that are read at once lie in different banks
constexpr int SCALE_ROW_BYTES = BITS == 4 ? (SCALE_CHUNKS | 1) * 16 : BITS == 8 ? 4 : 0;
constexpr int AT_X = 0;
constexpr int AT_GAIN = round_up(TOKENS * TOKEN_BYTES);
constexpr int AT_SCALES = round_up(AT_GAIN + (GAIN >= 0 ? CHUNKS * 32 : 0));
constexpr int AT_SQUARES = round_up(AT_SCALES + ROWS * SCALE_ROW_BYTES);
constexpr int AT_FACTORS = AT_SQUARES + (NORM ? TOKENS * WARPS * 4 : 0);
constexpr int AT_SUMS = round_up(AT_FACTORS + (NORM ? TOKENS * 4 : 0));
constexpr int SUMS = WARPS * TURN_UNITS;
static_assert(AT_SUMS + SUMS * TOKENS * ROWS * 4 <= SHARED_BYTES);

DEVICE float widened(u16 x, int dtype) { return dtype == 1 ? float_of_bits((u32)x << 16) : float_of_half(x); }
DEVICE float read(const void* p, long long i, int dtype) {
  return dtype == 0 ? ((const float*)p)[i] : widened(((const u16*)p)[i], dtype);
}
DEVICE u16 rounded(float x) { return VALUE == 1 ? bfloat_of_float(x) : half_of_float(x); }

struct alignas(16) Four {
  u32 word[4];
};
struct alignas(16) FourFloats {
  float at[4];
};
struct Arguments {
  const char* w;
  const void *scale, *x, *gain;
  u16* z;
  long long w_row, scale_row, scale_group, x_token, x_column, gain_column, z_token;
  int R;
  float eps, offset;
};

// What a thread works on. first: the block's first column; row: its first row.
struct Share {
  const Arguments& a;
  char* memory;
  int split, warp, lane, first, row;

  // Whether a column, counted from the block's first, is one of the block's.
  DEVICE bool there(int column) const { return WHOLE || (column < PART * UNIT && first + column < COLUMNS); }
  // Of the rows behind the last the last is read, and nothing is written.
  DEVICE int weight_row(int i) const { return row + i < a.R ? row + i : a.R - 1; }
  DEVICE char* x(int token) const { return memory + AT_X + token * TOKEN_BYTES; }
  DEVICE float* squares() const { return (float*)(memory + AT_SQUARES); }
  DEVICE float* factors() const { return (float*)(memory + AT_FACTORS); }
  DEVICE float* sums() const { return (float*)(memory + AT_SUMS); }
};
