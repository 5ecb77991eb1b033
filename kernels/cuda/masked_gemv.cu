// y_TN = c_N + sum over k with v_Tk^2 >= tau_k of v_Tk * w_kN for a weight in 4, 8 or 16 bits, on tensor cores, in one launch.
//
// A cluster of SPLITS blocks computes SEGMENTS * COLUMNS outputs. Block r of a cluster takes ranks in groups of 16 in turn, lists
// in shared memory those that some token keeps, with the tokens' values, 0 where a token drops the rank (listing.cuh), and its
// warps multiply 16 listed ranks at a time by COLUMNS outputs: 128 bytes of each rank's row, copied to shared memory STAGES - 1
// steps ahead (rows.cuh). Products of weights in 4 and 8 bits are of integers for 1 and 2 tokens (products_integers.cuh), whose
// factors value * scale are in fixed point (fixed_point.cuh), all others of the values' dtype (products_floats.cuh).
//
// Several weights (WEIGHTS) of one tensor are beside each other in a launch: each has clusters of its own, and thresholds.
//
// Sums over warps and blocks are exchanged through shared memory in a fixed order: neither partial sums in global memory nor atomics,
// and the same bits in every run.
//
// Constants of a compilation: BITS 4, 8 or 16, of the values' dtype; TOKENS 1 ... 16; GROUP columns of a scale (4 bits: 64 or 128);
// SEGMENTS, WARPS (along the ranks), SPLITS, STAGES; LISTED ranks of a block at most, a multiple of 16; INTEGERS 1: products of
// integers, at most 2 tokens, not in 16 bits; VALUE, SCALE dtypes (0 fp32, 1 bf16, 2 fp16) of v and y, and of scales (-1: none);
// SCALE_UNIT bytes that scales are copied at once (4 bits: 4, 8 or 16); THRESHOLD, BIAS and RESIDUAL dtypes (-1: none); ACTIVATION
// 0 none, 1 silu, 2 tanh-GELU, 3 ReLU, 4 GELU; NORM 1: v is v / sqrt(mean v^2 + eps) * (gain + offset), at most 4 tokens, with GAIN the
// gain's dtype (-1: none) and WIDE 1: eight neighbours of v are 16 aligned bytes; EARLY 1: the launch may begin before the kernel before
// it is done; SHARED_BYTES of dynamic shared memory.

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

// Adds what the warps and the cluster's blocks have stored, and writes outputs of tokens ``from`` ... from + AT_ONCE - 1.
DEVICE void exchange(const Share& share, int from, int split) {
  const Arguments& a = share.a;
  float* sums = (float*)(share.memory + AT_SUMS);
  int thread = thread_index();
  sync_block();
  // only this thread reads what it overwrites
  for (int i = thread; i < SEGMENTS * AT_ONCE * COLUMNS; i += THREADS) sums[i * SUM_WORDS] = sum_of_warps(share, i);
  if (SPLITS > 1) sync_cluster(); else sync_block();
  constexpr int OUTPUTS = (ACTIVATION ? SEGMENTS / 2 : SEGMENTS) * COLUMNS;
  constexpr int SHARE = (OUTPUTS * AT_ONCE + SPLITS - 1) / SPLITS;
  for (int i = split * SHARE + thread; i < (split + 1) * SHARE && i < OUTPUTS * AT_ONCE; i += THREADS) {
    int token = from + i / OUTPUTS, o = i % OUTPUTS, segment = o / COLUMNS * (ACTIVATION ? 2 : 1);
    int column = first_column(a, share.block, segment) + o % COLUMNS;
    if (token >= TOKENS || column >= (ACTIVATION ? a.half : a.N)) continue;
    float y[ACTIVATION ? 2 : 1];
#pragma unroll
    for (int part = 0; part < (ACTIVATION ? 2 : 1); part++) {
      const float* p = sums + (((segment + part) * AT_ONCE + token - from) * COLUMNS + place_of_sum(o % COLUMNS, token - from)) * SUM_WORDS;
      float sum = 0.f;
#pragma unroll
      for (int r = 0; r < SPLITS; r++) sum += SPLITS > 1 ? of_block(p, r) : *p;
      if (BIAS >= 0) sum += read(a.bias, (column + part * a.half) * a.bias_column, BIAS);
      y[part] = sum;
    }
    float result = ACTIVATION ? activated(y[0]) * y[ACTIVATION ? 1 : 0] : y[0];
    if (RESIDUAL >= 0) result += read(a.residual, token * a.residual_token + column * a.residual_column, RESIDUAL);
    a.y[token * a.y_token + column] = rounded(result);
  }
  // until all blocks have read, none may write the next tokens' sums or end
  if (SPLITS > 1) sync_cluster_after_reads(); else sync_block();
}

KERNEL void CLUSTER(SPLITS) BOUNDS(THREADS, BLOCKS) masked_gemv(CONSTANT Parts parts) {
  char* memory = shared_memory();
  int thread = thread_index(), warp = thread / LANES, segment = warp % SEGMENTS;
  int block = block_index() / SPLITS, split = block_index() % SPLITS, part = 0;
#pragma unroll
  for (int i = 0; i < WEIGHTS - 1; i++) part += block >= parts.ends[i];
  const Arguments& a = parts.of[part];
  block -= part > 0 ? parts.ends[part - 1] : 0;
  Thresholds thresholds(a, split);
  Share share{a, memory, block, warp, thread % LANES, segment, warp / SEGMENTS, first_column(a, block, segment), 0};
  Products products(share);
  Pipeline<Products> pipeline(share, products);
  bool works = share.column < share.end();
  // weights that are multiplied whatever the values are copied while the previous kernel runs
  bool all = false;
  if (EARLY) {
    share.listed = list_all(thresholds, memory);
    all = share.listed > 0;
    if (all && works) {
      products.begin();
      pipeline.begin();
    }
  }
  share.listed = list_ranks(thresholds, share);
  if (!all && works) {
    products.begin();
    pipeline.begin();
  }
  products.prepare();
  if (works) pipeline.run();
  sync_block();  // the sums lie where the operands were
#pragma unroll
  for (int from = 0; from < TOKENS; from += AT_ONCE) {
    products.store_sums(from);
    exchange(share, from, split);
  }
}
