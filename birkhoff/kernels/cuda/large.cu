// Scaling passes over one large matrix K in one cooperative launch: right = 1 / sums, left = 1 / (K right), sums = K^T left.
// Specialised by -D options: DOUBLE, THREADS, COLUMNS (of a thread, a multiple of VECTOR), VECTOR (elements of one access),
// GROUP (rows at a time, a power of two).
//
// A block owns some rows and its threads own columns. It keeps as many of its rows as fit in shared memory over all passes;
// the others come from the second-level cache or memory, once a pass: a group of rows stays in registers between its sums
// and its part of K^T left. The blocks' column sums are added in a fixed order, so results repeat bit for bit.

#if DOUBLE
typedef double real;
#else
typedef float real;
#endif
typedef long long i64;
typedef unsigned int u32;
#define INLINE __device__ __forceinline__

constexpr int WARPS = THREADS / 32, CHUNKS = COLUMNS / VECTOR, SPAN = THREADS * VECTOR;
struct alignas(VECTOR * sizeof(real)) Vector { real at[VECTOR]; };

// All blocks of the grid wait for each other; `turn` counts the barriers of this launch.
INLINE void grid_barrier(u32* arrived, u32& turn) {
  __syncthreads();
  turn += gridDim.x;
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    u32 seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
    } while (seen < turn);
  }
  __syncthreads();
}

// Sums of GROUP values over the warp: lane l holds that of value l / (32 / GROUP) afterwards.
INLINE real warp_sums(real (&p)[GROUP]) {
  int lane = threadIdx.x & 31;
#pragma unroll
  for (int count = GROUP, bit = 16; count > 1; count /= 2, bit /= 2) {
#pragma unroll
    for (int k = 0; k < count / 2; k++) {
      bool upper = lane & bit;
      real sent = upper ? p[k] : p[k + count / 2], own = upper ? p[k + count / 2] : p[k];
      p[k] = own + __shfl_xor_sync(~0u, sent, bit);
    }
  }
#pragma unroll
  for (int bit = 16 / GROUP; bit > 0; bit /= 2) p[0] += __shfl_xor_sync(~0u, p[0], bit);
  return p[0];
}

INLINE void read_row(real (&x)[COLUMNS], const real* row, int n, bool exists) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int column = c * SPAN + threadIdx.x * VECTOR;
    Vector v = exists && column < n ? *(const Vector*)(row + column) : Vector{};
#pragma unroll
    for (int k = 0; k < VECTOR; k++) x[c * VECTOR + k] = v.at[k];
  }
}
INLINE real worse(real x, real y) { return y <= x || x != x ? x : y; }  // the larger one; NaN stays

extern "C" __global__ void __launch_bounds__(THREADS, 1)
scaling_passes(const real* __restrict__ kernel, real* __restrict__ left, real* __restrict__ right, real* sums, real* slabs,
               real* __restrict__ errors, real* __restrict__ extremes, u32* arrived, int n, int resident, int count) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ real parts[2][WARPS][GROUP], folded[WARPS][32];
  real* kept = (real*)memory;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, blocks = gridDim.x;
  int first = (int)((i64)n * blockIdx.x / blocks), rows = (int)((i64)n * (blockIdx.x + 1) / blocks) - first;
  const real* own = kernel + (i64)first * n;
  if (resident > rows) resident = rows;
  for (int r = 0; r < resident; r++)
    for (int c = threadIdx.x * VECTOR; c < n; c += SPAN) *(Vector*)(kept + (i64)r * n + c) = *(const Vector*)(own + (i64)r * n + c);
  __syncthreads();
  real extreme = 0;
  u32 turn = 0;
  for (int pass = 0; pass < count; pass++) {
    real v[COLUMNS], acc[COLUMNS], x[GROUP][COLUMNS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      int column = c * SPAN + threadIdx.x * VECTOR;
#pragma unroll
      for (int k = 0; k < VECTOR; k++) {
        v[c * VECTOR + k] = column + k < n ? (real)1 / __ldcg(sums + column + k) : (real)0;
        acc[c * VECTOR + k] = 0;
      }
    }
    for (int r0 = 0, buffer = 0; r0 < rows; r0 += GROUP, buffer ^= 1) {
      real p[GROUP];
#pragma unroll
      for (int r = 0; r < GROUP; r++) {
        int row = r0 + r;
        if (row < resident) read_row(x[r], kept + (i64)row * n, n, true);
        else read_row(x[r], own + (i64)row * n, n, row < rows);
      }
#pragma unroll
      for (int r = 0; r < GROUP; r++) {
        p[r] = 0;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) p[r] += x[r][c] * v[c];
      }
      real mine = warp_sums(p);
      if (lane % (32 / GROUP) == 0) parts[buffer][warp][lane / (32 / GROUP)] = mine;
      __syncthreads();
      real total = 0;
#pragma unroll
      for (int w = lane / GROUP; w < WARPS; w += 32 / GROUP) total += parts[buffer][w][lane % GROUP];
#pragma unroll
      for (int bit = GROUP; bit < 32; bit *= 2) total += __shfl_xor_sync(~0u, total, bit);
      bool exists = r0 + lane % GROUP < rows;
      real u = exists ? (real)1 / total : (real)0;
      if (exists) extreme = worse(extreme, fabs(log(u)));
      if (warp == 0 && lane < GROUP && exists) left[first + r0 + lane] = u;
#pragma unroll
      for (int r = 0; r < GROUP; r++) {
        real scale = __shfl_sync(~0u, u, r);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) acc[c] += scale * x[r][c];
      }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      int column = c * SPAN + threadIdx.x * VECTOR;
      if (column < n) {
        Vector out;
#pragma unroll
        for (int k = 0; k < VECTOR; k++) out.at[k] = acc[c * VECTOR + k];
        *(Vector*)(slabs + (i64)blockIdx.x * n + column) = out;
      }
    }
    grid_barrier(arrived, turn);
    // This block's share of the columns: add the slabs, first within warps, then the warps' sums, in order.
    real error = 0;
    for (int c0 = first; c0 < first + rows; c0 += 32) {
      int column = c0 + lane;
      bool exists = column < first + rows;
      real total = 0;
      if (exists)
        for (int b = warp; b < blocks; b += WARPS) total += __ldcg(slabs + (i64)b * n + column);
      folded[warp][lane] = total;
      __syncthreads();
      if (warp == 0 && exists) {
        total = folded[0][lane];
        for (int w = 1; w < WARPS; w++) total += folded[w][lane];
        real before = (real)1 / __ldcg(sums + column);
        error = worse(error, fabs(total * before - 1));
        extreme = worse(extreme, fabs(log(before)));
        right[column] = before;
        sums[column] = total;
      }
      __syncthreads();
    }
    if (warp == 0) {
#pragma unroll
      for (int bit = 16; bit > 0; bit /= 2) error = worse(error, __shfl_xor_sync(~0u, error, bit));
      if (lane == 0) errors[(i64)pass * blocks + blockIdx.x] = error;
    }
    grid_barrier(arrived, turn);
  }
  if (warp == 0) {
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2) extreme = worse(extreme, __shfl_xor_sync(~0u, extreme, bit));
    if (lane == 0) extremes[blockIdx.x] = extreme;
  }
}
