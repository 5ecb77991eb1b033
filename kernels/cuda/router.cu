// z_TR = x_TD @ w_RD^T for a few tokens and a weight in 4, 8 or 16 bits, on tensor cores, in one launch; optionally with the
// root-mean-square norm of x in front: x / sqrt(mean x^2 + eps) * (gain + offset).
//
// A block computes ROWS outputs of all tokens; its warps share the columns, as do the SPLITS blocks of a cluster. Sums are over the
// columns of a row, in any order: so the first operand of a product, 16 rows by 16 columns, is what lanes read of the rows, 8 or 16
// neighbouring bytes each, straight into registers (router_numbers.cuh), and x is reordered alike in shared memory
// (router_values.cuh). Weights are constants: an early launch reads HELD registers of them, mostly the whole tile of the block, before
// it waits for the kernel that computes x. Sums over warps and blocks are in a fixed order: the same bits in every run.
//
// What is rounded: products are exact, sums are in fp32, in 4 bits of a group before its scale; z. With a gain x * (gain + offset) is
// rounded once to the dtype of x, as the normed input of a dense matmul is, in fp16 after the division by the norm.
//
// Constants of a compilation: BITS 4, 8 or 16 (the dtype of x); TOKENS 1 ... 16; COLUMNS of a row (of multiples of 16 bytes); GROUP
// columns of a scale (4 bits: 64 or 128); ROWS 8 (up to 4 tokens), 16, 32 or 64; WARPS; SPLITS; HELD registers of weights of a thread; VALUE, SCALE
// dtypes (0 fp32, 1 bf16, 2 fp16) of x and z, and of scales; SCALE_UNIT bytes that scales are copied at once (4 bits: 2, 4, 8 or 16);
// NORM 1: with a norm; GAIN its gain's dtype (-1: none); WIDE 1: chunks of 8 numbers of x are 16 aligned bytes; EARLY 1: the launch may
// begin before the kernel before it is done; SHARED_BYTES of dynamic shared memory.

DEVICE void sync_sums() {
  if (SPLITS > 1) sync_cluster(); else sync_block();
}

// Adds what warps and blocks have stored, and writes the outputs. All threads call it after a barrier.
DEVICE void write_outputs(const Share& share) {
  constexpr int OUTPUTS = TOKENS * ROWS, MINE = (OUTPUTS + SPLITS - 1) / SPLITS;
  const Arguments& a = share.a;
  float* sums = share.sums();
  int thread = thread_index();
  auto sum_of_warps = [&](int i) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < SUMS; j++) sum += sums[j * OUTPUTS + i];
    return sum;
  };
  if (SPLITS > 1) {
    // only this thread reads what it overwrites
    for (int i = thread; i < OUTPUTS; i += THREADS) sums[i] = sum_of_warps(i);
    if (!NORM_FIRST) publish_squares(share);
    sync_cluster();
  }
  for (int i = share.split * MINE + thread; i < (share.split + 1) * MINE && i < OUTPUTS; i += THREADS) {
    int token = i / ROWS, row = i % ROWS;
    if (share.row + row >= a.R) continue;
    float z = 0.f;
    if (SPLITS == 1) z = sum_of_warps(i);
#pragma unroll
    for (int r = 0; SPLITS > 1 && r < SPLITS; r++) z += of_block(sums + i, r);
    z *= NUMBER_UNIT;
    if (BITS == 8) z *= ((const float*)(share.memory + AT_SCALES))[row];
    if (NORM && !NORM_FIRST) z *= factor_of_norm(share, token);
    a.z[token * a.z_token + share.row + row] = rounded(z);
  }
  // until all blocks have read, none may end
  if (SPLITS > 1) sync_cluster_after_reads();
}

#if SPLITS > 1
#define LAUNCHED CLUSTER(SPLITS) BOUNDS(THREADS, BLOCKS)
#else
#define LAUNCHED BOUNDS(THREADS, BLOCKS)
#endif
KERNEL void LAUNCHED router(CONSTANT Arguments a) {
  u32 thread = thread_index(), block = block_index();
  int split = block % SPLITS, first_row = block / SPLITS * ROWS;
  Share share{a, shared_memory(), split, (int)(thread / LANES), (int)(thread % LANES), split * PART * UNIT, first_row};
  Products products(share);
  products.begin();
  begin_constants(share);
  if (EARLY) {
    wait_for_previous_kernel();
    start_next_kernel();
  }
  copy_values(share);
  if (NORM_FIRST) {
    square_values(share);
    sync_block();
    publish_squares(share);
    sync_sums();
    if (thread < TOKENS) share.factors()[thread] = factor_of_norm(share, thread);
    sync_block();
  }
  reorder_values<NORM_FIRST>(share);
  sync_block();
  products.run();
  products.store();
  sync_block();
  write_outputs(share);
}
