// The instructions that masked_gemv.cu and router.cu are written in, for compute capability 9.0. No header of the CUDA toolkit is included, so that
// NVRTC needs none. tests/support/emulated_gpu.h defines the same names for a CPU.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
#define CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#define BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define CONSTANT const __grid_constant__

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE u32 ballot(bool p) { return __ballot_sync(~0u, p); }
DEVICE u32 largest_in_warp(u32 x) { return __reduce_max_sync(~0u, x); }
DEVICE int ones(u32 x) { return __popc(x); }
DEVICE u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
// (a & b) ^ c
DEVICE u32 and_xor(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE float float_of_bits(u32 x) { return __uint_as_float(x); }
DEVICE u32 bits_of_float(float x) { return __float_as_uint(x); }
DEVICE int nearest_integer(float x) { return __float2int_rn(x); }
DEVICE float float_of_half(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE u16 half_of_float(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE u16 bfloat_of_float(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float exponential(float x) { return expf(x); }
DEVICE float error_function(float x) { return erff(x); }
DEVICE float inverse_root(float x) { return rsqrtf(x); }
// the same bits in all lanes
DEVICE float sum_in_warp(float x) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

// Pairs of numbers in the dtype of the values; subnormal ones count.
#if VALUE == 1
#define DTYPE "bf16"
#else
#define DTYPE "f16"
#endif
DEVICE u32 pair_of(float low, float high) {
  u32 d;
  asm("cvt.rn." DTYPE "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u32 product(u32 a, u32 b) {
  u32 d;
  asm("mul.rn." DTYPE "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// a * b + c, rounded once
DEVICE u32 product_plus(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." DTYPE "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// c (16 x 8, fp32) += a (16 x 16) * b (16 x 8)
DEVICE void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." DTYPE "." DTYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c (16 x 8, s32) += a (16 x 32, s8) * b (32 x 8, s8)
DEVICE void multiply(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four matrices of 8 rows of 8 numbers of 16 bits, transposed: lane i gives the address of row i % 8 of matrix i / 8, and gets numbers
// i / 4 of rows 2 (i % 4) and 2 (i % 4) + 1 of each.
DEVICE void load_transposed(u32 (&x)[4], const void* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// WORDS (2 or 4) neighbouring words of global memory, read by one thread once; CHECKED: zeros unless ``there``. Not by ld.global.nc, which
// the assembler moves behind a wait for the previous kernel.
template <int WORDS, bool CHECKED>
DEVICE void read_once(u32 (&to)[WORDS], const char* from, bool there) {
  int p = CHECKED ? there : 1;
  if constexpr (WORDS == 4) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
                 "@p ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];}"
                 : "=&r"(to[0]), "=&r"(to[1]), "=&r"(to[2]), "=&r"(to[3])
                 : "l"(from), "r"(p));
  } else {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0;\n"
                 "@p ld.global.L1::no_allocate.v2.b32 {%0,%1}, [%2];}"
                 : "=&r"(to[0]), "=&r"(to[1])
                 : "l"(from), "r"(p));
  }
}

// x, which the compiler cannot know to be x: it computes x once and keeps it, and does not take an address apart. All lanes call it.
DEVICE u32 kept(u32 x) { return __shfl_xor_sync(~0u, x, 0); }
DEVICE const char* kept(const char* x) { return (const char*)__shfl_xor_sync(~0u, (u64)x, 0); }
// as below if ``there``, without a branch
template <int BYTES>
DEVICE void copy_if(bool there, void* to, const void* from, int size) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  if (BYTES == 16) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2;}" ::"r"(address), "l"(from),
                 "r"(size), "r"((int)there)
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %4, 0; @p cp.async.ca.shared.global [%0], [%1], %2, %3;}" ::"r"(address), "l"(from),
                 "n"(BYTES == 16 ? 4 : BYTES), "r"(size), "r"((int)there)
                 : "memory");
  }
}
// BYTES (4, 8 or 16) from global to shared memory without registers, zeros beyond ``size``; complete after wait_for_copies
template <int BYTES>
DEVICE void copy(void* to, const void* from, int size) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES == 16 ? 4 : BYTES), "r"(size) : "memory");
  }
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int OPEN>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// thread-block clusters: blocks that run at the same time and read each other's shared memory
DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same after reads whose values have been used: stores before it need not be visible to other blocks, which makes it shorter.
DEVICE void sync_cluster_after_reads() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE float of_block(const float* p, int rank) {
  u32 address = (u32)__cvta_generic_to_shared(p), there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}
