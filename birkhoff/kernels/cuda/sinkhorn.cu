// Batched Sinkhorn, forward and exact backward, specialised at run time by -D options:
//   N            size of a matrix, 1..32
//   G            a matrix is spread over a G x G grid of lanes, each holding a block of B x B entries (G = 1: one matrix a lane)
//   ELEMENT      type in memory: 0 float, 1 bfloat16, 2 half, 3 double
//   DAMPED       1: DeepSeek's recurrence, softmax + eps_start and eps_den in each sum
//   ROWS_FIRST   1: rows are normalised first; the matrix is read and written transposed and everything below is unchanged
//   CAPPED       1: logits further than range_cap below the largest of their column are raised to it
//   BACKWARD     which of the two kernels
//   THREADS, BLOCKS   launch bounds;  PAIRS_A, PAIRS_B   how many pairs of sums share a reciprocal in each half step
//
// Columns first, K = exp(X - column max), b_0 = 1:   a_t = 1 / (K^T b_{t-1}),  b_t = 1 / (K a_t),  P = diag(b_T) K diag(a_T).
// Two sums share a reciprocal where no entry is below 2^-60 of its column's largest, so that their product is safe (double:
// 2^-480). Down to 2^-100 (2^-900) each sum has its own. A matrix beyond that is computed again on logarithms.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#if ELEMENT == 3
typedef double real;
typedef double element;
constexpr double PAIRED_TO = -480, LINEAR_TO = -900;
#else
typedef float real;
constexpr float PAIRED_TO = -60, LINEAR_TO = -100;
#if ELEMENT == 0
typedef float element;
#else
typedef u16 element;
#endif
#endif

#define INLINE __device__ __forceinline__
#define SLOW static __device__ __noinline__

constexpr int B = (N + G - 1) / G;                        // entries of a block's side
constexpr int MATRIX_BYTES = N * N * (int)sizeof(element);
constexpr int PER_WARP = 32 / (G * G);                    // matrices a warp holds
constexpr bool PADDED = B * G != N;
constexpr real LOG2E = (real)1.4426950408889634;
constexpr int UNROLL = B <= 4 ? 4 : 1;

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic

#if ELEMENT == 3
INLINE real exp_2(real x) { return exp2(x); }
INLINE real log_2(real x) { return log2(x); }
INLINE real approximate_reciprocal(real x) { return 1.0 / x; }
INLINE real rounded_reciprocal(real x) { return 1.0 / x; }
INLINE real fused(real x, real y, real z) { return fma(x, y, z); }
INLINE real larger(real x, real y) { return fmax(x, y); }
INLINE real smaller(real x, real y) { return fmin(x, y); }
#else
INLINE real exp_2(real x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE real log_2(real x) { return log2f(x); }
INLINE real approximate_reciprocal(real x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE real rounded_reciprocal(real x) { float y = approximate_reciprocal(x); return fmaf(y, fmaf(-x, y, 1.0f), y); }
INLINE real fused(real x, real y, real z) { return fmaf(x, y, z); }
INLINE real larger(real x, real y) { return fmaxf(x, y); }
INLINE real smaller(real x, real y) { return fminf(x, y); }
#endif
constexpr real ZERO = 0, ONE = 1;
INLINE real minus_infinity() { return -(real)__int_as_float(0x7f800000); }

#if ELEMENT == 0 || ELEMENT == 3
INLINE real widen(element x) { return x; }
INLINE element narrow(real x) { return x; }
#elif ELEMENT == 1
INLINE real widen(element x) { return __uint_as_float((u32)x << 16); }
INLINE element narrow(real x) { u16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
INLINE real widen(element x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
INLINE element narrow(real x) { u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The lane's place in the grid that holds its matrix, and sums over that grid

struct Place { int row, column; };

INLINE Place place() {
  int sub = (int)(threadIdx.x & 31) % (G * G);
  return ROWS_FIRST ? Place{sub % G, sub / G} : Place{sub / G, sub % G};
}
// Lanes that share a block column differ by ROW_STEP, lanes that share a block row by COLUMN_STEP.
constexpr int ROW_STEP = ROWS_FIRST ? 1 : G, COLUMN_STEP = ROWS_FIRST ? G : 1;

template <int STEP> INLINE real sum_over(real x) {
#pragma unroll
  for (int k = 1; k < G; k *= 2) x += __shfl_xor_sync(~0u, x, k * STEP);
  return x;
}
template <int STEP> INLINE real max_over(real x) {
#pragma unroll
  for (int k = 1; k < G; k *= 2) x = larger(x, __shfl_xor_sync(~0u, x, k * STEP));
  return x;
}

// s_j = sum_i m_ij v_i
INLINE void column_sums(const real (&m)[B * B], const real (&v)[B], real (&s)[B]) {
#pragma unroll
  for (int j = 0; j < B; j++) {
    real x = m[j] * v[0];
#pragma unroll
    for (int i = 1; i < B; i++) x = fused(m[i * B + j], v[i], x);
    s[j] = sum_over<ROW_STEP>(x);
  }
}
// s_i = sum_j m_ij v_j
INLINE void row_sums(const real (&m)[B * B], const real (&v)[B], real (&s)[B]) {
#pragma unroll
  for (int i = 0; i < B; i++) {
    real x = m[i * B] * v[0];
#pragma unroll
    for (int j = 1; j < B; j++) x = fused(m[i * B + j], v[j], x);
    s[i] = sum_over<COLUMN_STEP>(x);
  }
}

// 1/s, the first 2 * PAIRS of them two to a reciprocal. `line` is the place along the axis; padding's sums count as one.
template <int PAIRS> INLINE void invert(real (&s)[B], int line) {
  if (PADDED) {
#pragma unroll
    for (int k = 0; k < B; k++) s[k] = line * B + k < N ? s[k] : ONE;
  }
#pragma unroll
  for (int k = 0; k < B; k++) {
    if (k + 1 < B && k % 2 == 0 && k / 2 < PAIRS) {
      real x = s[k], both = approximate_reciprocal(x * s[k + 1]);
      s[k] = both * s[k + 1];
      s[k + 1] = both * x;
    } else if (k / 2 >= PAIRS || k == B - 1 && B % 2) {
      s[k] = approximate_reciprocal(s[k]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Start

// Logits to exponents of two below the largest of each column. The subtracted constant cancels in the first normalisation,
// so its rounding does not matter; product and subtraction are one fused operation.
INLINE void exponents(real (&e)[B * B], real range_cap, Place at) {
#pragma unroll
  for (int j = 0; j < B; j++) {
    real peak = minus_infinity();
#pragma unroll
    for (int i = 0; i < B; i++) if (!PADDED || at.row * B + i < N) peak = larger(peak, e[i * B + j]);
    peak = max_over<ROW_STEP>(peak);
    if (peak == minus_infinity()) peak = 0;
    real offset = peak * LOG2E;
#pragma unroll
    for (int i = 0; i < B; i++) {
      real x = e[i * B + j], y = fused(x, LOG2E, -offset);
      if (CAPPED && x < peak - range_cap) y = -range_cap * LOG2E;
      if (PADDED && (at.row * B + i >= N || at.column * B + j >= N)) y = minus_infinity();
      e[i * B + j] = y;
    }
  }
}

// The lowest exponent of the lane's matrix.
INLINE real lowest(const real (&e)[B * B], Place at) {
  real low = 0;
#pragma unroll
  for (int i = 0; i < B; i++)
#pragma unroll
    for (int j = 0; j < B; j++)
      if (!PADDED || (at.row * B + i < N && at.column * B + j < N)) low = smaller(low, e[i * B + j]);
  low = -max_over<1>(-low);
  return G > 1 ? -max_over<G>(-low) : low;
}

// K = 2^e; for the damped recurrence softmax + eps_start, with the softmax kept in `soft`.
INLINE void start(real (&m)[B * B], real eps_start, Place at) {
#pragma unroll
  for (int k = 0; k < B * B; k++) m[k] = exp_2(m[k]);
  if (DAMPED) {
    real ones[B], s[B];
#pragma unroll
    for (int k = 0; k < B; k++) ones[k] = 1;
    column_sums(m, ones, s);
#pragma unroll
    for (int j = 0; j < B; j++) s[j] = rounded_reciprocal(s[j] == ZERO ? ONE : s[j]);
#pragma unroll
    for (int i = 0; i < B; i++)
#pragma unroll
      for (int j = 0; j < B; j++) {
        real x = m[i * B + j] * s[j];
        m[i * B + j] = PADDED && (at.row * B + i >= N || at.column * B + j >= N) ? ZERO : x + eps_start;
      }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Half steps

INLINE void damp(real (&s)[B], const real (&before)[B], real eps, int line) {
#pragma unroll
  for (int k = 0; k < B; k++) {
    real total = fused(before[k], s[k], eps);
    if (PADDED && line * B + k >= N || total == ZERO) total = 1;
    s[k] = before[k] * approximate_reciprocal(total);
  }
}
template <int PAIRS> INLINE void column_step(const real (&m)[B * B], const real (&b)[B], real (&a)[B], real eps, Place at) {
  real s[B];
  column_sums(m, b, s);
  if (DAMPED) damp(s, a, eps, at.column); else invert<PAIRS>(s, at.column);
#pragma unroll
  for (int k = 0; k < B; k++) a[k] = s[k];
}
template <int PAIRS> INLINE void row_step(const real (&m)[B * B], const real (&a)[B], real (&b)[B], real eps, Place at) {
  real s[B];
  row_sums(m, a, s);
  if (DAMPED) damp(s, b, eps, at.row); else invert<PAIRS>(s, at.row);
#pragma unroll
  for (int k = 0; k < B; k++) b[k] = s[k];
}
// Scalings before the first full iteration (the damped recurrence has divided its rows once by then).
INLINE void begin(const real (&m)[B * B], real (&a)[B], real (&b)[B], real eps, Place at) {
#pragma unroll
  for (int k = 0; k < B; k++) a[k] = b[k] = 1;
  if (DAMPED) row_step<0>(m, a, b, eps, at);
}

// m over its row sums, which are then one within N + 1 roundings; a row of zeros stays.
INLINE void divide_rows(real (&m)[B * B]) {
#pragma unroll
  for (int i = 0; i < B; i++) {
    real s = m[i * B];
#pragma unroll
    for (int j = 1; j < B; j++) s += m[i * B + j];
    s = sum_over<COLUMN_STEP>(s);
    s = rounded_reciprocal(s == ZERO ? ONE : s);
#pragma unroll
    for (int j = 0; j < B; j++) m[i * B + j] *= s;
  }
}

// -log2 of the sums of 2^(e + v) over each column (v by row); zero for a column of zeros, which then stays.
INLINE void log_column_sums(const real (&e)[B * B], const real (&v)[B], real (&a)[B]) {
#pragma unroll
  for (int j = 0; j < B; j++) {
    real peak = minus_infinity(), s = 0;
#pragma unroll
    for (int i = 0; i < B; i++) peak = larger(peak, e[i * B + j] + v[i]);
    peak = max_over<ROW_STEP>(peak);
    if (peak == minus_infinity()) peak = 0;
#pragma unroll
    for (int i = 0; i < B; i++) s += exp_2(e[i * B + j] + v[i] - peak);
    s = sum_over<ROW_STEP>(s);
    a[j] = s == ZERO ? ZERO : -peak - log_2(s);
  }
}
INLINE void log_row_sums(const real (&e)[B * B], const real (&v)[B], real (&b)[B]) {
#pragma unroll
  for (int i = 0; i < B; i++) {
    real peak = minus_infinity(), s = 0;
#pragma unroll
    for (int j = 0; j < B; j++) peak = larger(peak, e[i * B + j] + v[j]);
    peak = max_over<COLUMN_STEP>(peak);
    if (peak == minus_infinity()) peak = 0;
#pragma unroll
    for (int j = 0; j < B; j++) s += exp_2(e[i * B + j] + v[j] - peak);
    s = sum_over<COLUMN_STEP>(s);
    b[i] = s == ZERO ? ZERO : -peak - log_2(s);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory. G = 1: the 32 matrices of a warp are contiguous; they travel in 16-byte pieces through shared memory, placed so
// that neither side meets a bank twice. G > 1: each lane reads its block.

constexpr int PIECES = MATRIX_BYTES / 16;
constexpr bool IN_PIECES = MATRIX_BYTES % 16 == 0;
constexpr bool SWIZZLED = IN_PIECES && (PIECES & (PIECES - 1)) == 0 && PIECES > 1;
constexpr int TILE_BYTES = G == 1 ? 32 * MATRIX_BYTES : 0;

INLINE int entry(int i, int j) { return ROWS_FIRST ? j * N + i : i * N + j; }

INLINE int piece_at(int matrix, int piece) {
  constexpr int SPREAD = PIECES >= 8 ? 8 : PIECES, SHARE = PIECES >= 8 ? 1 : 8 / (PIECES ? PIECES : 1);
  return matrix * PIECES + (SWIZZLED ? piece ^ ((matrix / SHARE) & (SPREAD - 1)) : piece);
}
INLINE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Start copying the warp's tile; bytes beyond the batch read as zero.
INLINE void fetch_tile(unsigned char* shared, const element* source, i64 first, i64 batch) {
  int lane = threadIdx.x & 31;
  const unsigned char* from = (const unsigned char*)(source + first * (N * N));
  i64 left = (batch - first) * MATRIX_BYTES;
#pragma unroll
  for (int k = 0; k < (TILE_BYTES / 16 + 31) / 32; k++) {
    int p = k * 32 + lane;
    if (TILE_BYTES / 16 % 32 == 0 || p < TILE_BYTES / 16) {
      i64 here = left - (i64)p * 16;
      int bytes = here >= 16 ? 16 : here > 0 ? (int)here : 0;
      int to = SWIZZLED ? piece_at(p / (PIECES ? PIECES : 1), p % (PIECES ? PIECES : 1)) : p;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared + to * 16)),
                   "l"(bytes ? from + (i64)p * 16 : (const unsigned char*)source), "r"(bytes) : "memory");
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> INLINE void wait_tile() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
  __syncwarp();
}
// The lane's own matrix, from and to shared memory.
INLINE void read_tile(const unsigned char* shared, real (&m)[B * B]) {
  int lane = threadIdx.x & 31;
  if (IN_PIECES) {
    constexpr int EACH = 16 / (int)sizeof(element);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      uint4 word = *(const uint4*)(shared + piece_at(lane, p) * 16);
      const element* x = (const element*)&word;
#pragma unroll
      for (int k = 0; k < EACH; k++) { int i = (p * EACH + k) / N, j = (p * EACH + k) % N; m[entry(i, j)] = widen(x[k]); }
    }
  } else {
    const element* x = (const element*)shared + lane * (N * N);
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int j = 0; j < N; j++) m[entry(i, j)] = widen(x[i * N + j]);
  }
}
INLINE void write_tile(unsigned char* shared, const real (&m)[B * B], element* target, i64 first, i64 batch) {
  int lane = threadIdx.x & 31;
  if (IN_PIECES) {
    constexpr int EACH = 16 / (int)sizeof(element);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      uint4 word;
      element* x = (element*)&word;
#pragma unroll
      for (int k = 0; k < EACH; k++) { int i = (p * EACH + k) / N, j = (p * EACH + k) % N; x[k] = narrow(m[entry(i, j)]); }
      *(uint4*)(shared + piece_at(lane, p) * 16) = word;
    }
  } else {
    element* x = (element*)shared + lane * (N * N);
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int j = 0; j < N; j++) x[i * N + j] = narrow(m[entry(i, j)]);
  }
  __syncwarp();
  element* to = target + first * (N * N);
  if (first + 32 <= batch) {
#pragma unroll
    for (int k = 0; k < (TILE_BYTES / 16 + 31) / 32; k++) {
      int p = k * 32 + lane;
      if (TILE_BYTES / 16 % 32 == 0 || p < TILE_BYTES / 16) {
        int from = SWIZZLED ? piece_at(p / (PIECES ? PIECES : 1), p % (PIECES ? PIECES : 1)) : p;
        __stcs((uint4*)to + p, *(const uint4*)(shared + from * 16));
      }
    }
  } else if (first + lane < batch) {
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int j = 0; j < N; j++) to[(i64)lane * (N * N) + i * N + j] = narrow(m[entry(i, j)]);
  }
  __syncwarp();
}

// The lane's block straight from and to global memory.
INLINE void read_block(const element* source, i64 matrix, i64 batch, Place at, real (&m)[B * B]) {
  const element* from = source + matrix * (N * N);
#pragma unroll
  for (int i = 0; i < B; i++)
#pragma unroll
    for (int j = 0; j < B; j++) {
      int row = at.row * B + i, column = at.column * B + j;
      bool inside = matrix < batch && (!PADDED || (row < N && column < N));
      m[i * B + j] = inside ? widen(from[entry(row, column)]) : ZERO;
    }
}
INLINE void write_block(element* target, i64 matrix, i64 batch, Place at, const real (&m)[B * B]) {
  element* to = target + matrix * (N * N);
#pragma unroll
  for (int i = 0; i < B; i++)
#pragma unroll
    for (int j = 0; j < B; j++) {
      int row = at.row * B + i, column = at.column * B + j;
      if (matrix < batch && (!PADDED || (row < N && column < N))) to[entry(row, column)] = narrow(m[i * B + j]);
    }
}

#if !BACKWARD

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// The same iteration on log2 of the matrix itself, for matrices that linear arithmetic cannot hold; overwrites their result.
SLOW void forward_on_logarithms(const element* logits, element* target, i64 matrix, i64 batch, int num_iters, real range_cap,
                                bool wide) {
  Place at = place();
  real e[B * B], v[B], none[B];
  read_block(logits, matrix, batch, at, e);
  exponents(e, range_cap, at);
#pragma unroll
  for (int k = 0; k < B; k++) none[k] = 0;
#pragma unroll 1
  for (int t = 0; t < num_iters; t++) {
    log_column_sums(e, none, v);
#pragma unroll
    for (int k = 0; k < B * B; k++) e[k] += v[k % B];
    log_row_sums(e, none, v);
#pragma unroll
    for (int k = 0; k < B * B; k++) e[k] += v[k / B];
  }
#pragma unroll
  for (int k = 0; k < B * B; k++) e[k] = exp_2(e[k]);
  divide_rows(e);
  if (wide) write_block(target, matrix, batch, at, e);
}

// Column scalings of the last iteration (damped: both scalings).
template <int IN_COLUMNS, int IN_ROWS>
INLINE void scalings(const real (&m)[B * B], real (&a)[B], real (&b)[B], int num_iters, real eps, Place at) {
  begin(m, a, b, eps, at);
#pragma unroll UNROLL
  for (int t = 1; t < num_iters; t++) {
    column_step<IN_COLUMNS>(m, b, a, eps, at);
    row_step<IN_ROWS>(m, a, b, eps, at);
  }
  if (!DAMPED) column_step<IN_COLUMNS>(m, b, a, eps, at);
}

// Exponents to the result, for every matrix whose exponents are at least LINEAR_TO.
INLINE void iterate(real (&m)[B * B], real low, int num_iters, real eps_start, real eps_den, Place at) {
  real a[B], b[B];
  start(m, eps_start, at);
  bool narrow_range = low >= PAIRED_TO;
  if (DAMPED || __any_sync(~0u, narrow_range)) scalings<PAIRS_A, PAIRS_B>(m, a, b, num_iters, eps_den, at);
  if (!DAMPED && PAIRS_A + PAIRS_B > 0 && __any_sync(~0u, !narrow_range && low >= LINEAR_TO)) {
    real a1[B], b1[B];
    scalings<0, 0>(m, a1, b1, num_iters, eps_den, at);
#pragma unroll
    for (int k = 0; k < B; k++) a[k] = narrow_range ? a[k] : a1[k];
  }
  if (DAMPED) {
#pragma unroll
    for (int k = 0; k < B * B; k++) m[k] *= a[k % B] * b[k / B];
  } else {  // the last half step divides the matrix itself, so that its sums are exact
#pragma unroll
    for (int k = 0; k < B * B; k++) m[k] *= a[k % B];
    divide_rows(m);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
sinkhorn_forward(const element* __restrict__ logits, element* __restrict__ matrix, i64 batch, int num_iters, real eps_start,
                 real eps_den, real range_cap) {
  extern __shared__ __align__(16) unsigned char memory[];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sub = lane / (G * G);
  i64 tile = (i64)blockIdx.x * (THREADS / 32) + warp, step = (i64)gridDim.x * (THREADS / 32);
  Place at = place();
  real m[B * B];
  if (G == 1) {
    unsigned char* in = memory + warp * 2 * TILE_BYTES;
    if (tile * 32 < batch) fetch_tile(in, logits, tile * 32, batch);
    for (; tile * 32 < batch; tile += step) {
      wait_tile<0>();
      read_tile(in, m);
      __syncwarp();
      if ((tile + step) * 32 < batch) fetch_tile(in, logits, (tile + step) * 32, batch);
      exponents(m, range_cap, at);
      real low = lowest(m, at);
      bool wide = !DAMPED && !(low >= LINEAR_TO);
      iterate(m, low, num_iters, eps_start, eps_den, at);
      write_tile(in + TILE_BYTES, m, matrix, tile * 32, batch);
      if (!DAMPED && __any_sync(~0u, wide))
        forward_on_logarithms(logits, matrix, tile * 32 + lane, batch, num_iters, range_cap, wide);
    }
  } else {
    for (; tile * PER_WARP < batch; tile += step) {
      i64 mine = tile * PER_WARP + sub;
      read_block(logits, mine, batch, at, m);
      exponents(m, range_cap, at);
      real low = lowest(m, at);
      bool wide = !DAMPED && !(low >= LINEAR_TO);
      iterate(m, low, num_iters, eps_start, eps_den, at);
      write_block(matrix, mine, batch, at, m);
      if (!DAMPED && __any_sync(~0u, wide))
        forward_on_logarithms(logits, matrix, mine, batch, num_iters, range_cap, wide);
    }
  }
}

#else

// ---------------------------------------------------------------------------------------------------------------------
// Backward: the scalings of `kept` iterations at a time lie in shared memory; earlier iterations are replayed.

// Slot k of iteration t: one number a lane, lane by lane, so that no bank is met twice.
INLINE void keep(real* history, int t, const real (&a)[B], const real (&b)[B]) {
  real* to = history + t * (2 * B * 32) + (threadIdx.x & 31) * (B % 4 == 0 && sizeof(real) == 4 ? 4 : 1);
  if (B % 4 == 0 && sizeof(real) == 4) {
#pragma unroll
    for (int k = 0; k < B; k += 4) {
      *(float4*)(to + k * 32) = make_float4(a[k], a[k + 1], a[k + 2], a[k + 3]);
      *(float4*)(to + (B + k) * 32) = make_float4(b[k], b[k + 1], b[k + 2], b[k + 3]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < B; k++) { to[k * 32] = a[k]; to[(B + k) * 32] = b[k]; }
  }
}
INLINE void recall(const real* history, int t, real (&a)[B], real (&b)[B]) {
  const real* from = history + t * (2 * B * 32) + (threadIdx.x & 31) * (B % 4 == 0 && sizeof(real) == 4 ? 4 : 1);
  if (B % 4 == 0 && sizeof(real) == 4) {
#pragma unroll
    for (int k = 0; k < B; k += 4) {
      float4 x = *(const float4*)(from + k * 32), y = *(const float4*)(from + (B + k) * 32);
      a[k] = x.x; a[k + 1] = x.y; a[k + 2] = x.z; a[k + 3] = x.w;
      b[k] = y.x; b[k + 1] = y.y; b[k + 2] = y.z; b[k + 3] = y.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < B; k++) { a[k] = from[k * 32]; b[k] = from[(B + k) * 32]; }
  }
}

// Gradients of K, a and b of P = diag(b) K diag(a); dm comes as the gradient of P and leaves as that of K.
INLINE void pull_result(const real (&m)[B * B], const real (&a)[B], const real (&b)[B], real (&dm)[B * B], real (&da)[B],
                        real (&db)[B]) {
#pragma unroll
  for (int k = 0; k < B; k++) da[k] = db[k] = 0;
#pragma unroll
  for (int i = 0; i < B; i++)
#pragma unroll
    for (int j = 0; j < B; j++) {
      real flow = dm[i * B + j] * m[i * B + j];
      da[j] = fused(flow, b[i], da[j]);
      db[i] = fused(flow, a[j], db[i]);
      dm[i * B + j] *= a[j] * b[i];
    }
#pragma unroll
  for (int k = 0; k < B; k++) { da[k] = sum_over<ROW_STEP>(da[k]); db[k] = sum_over<COLUMN_STEP>(db[k]); }
}

// One full iteration backwards: from the scalings after it (a, b) and before it (a0, b0); da, db become those before it.
//   q = -b^2 db,  dK += q a^T,  da += K^T q;      s = -a^2 da,  dK += b0 s^T,  db = K s
INLINE void pull_iteration(const real (&m)[B * B], const real (&a)[B], const real (&b)[B], const real (&a0)[B],
                           const real (&b0)[B], real (&dm)[B * B], real (&da)[B], real (&db)[B], real eps) {
  real q[B], s[B], flow[B];
#pragma unroll
  for (int i = 0; i < B; i++) q[i] = -b[i] * (b[i] * db[i]);
  column_sums(m, q, flow);
#pragma unroll
  for (int i = 0; i < B; i++)
#pragma unroll
    for (int j = 0; j < B; j++) dm[i * B + j] = fused(q[i], a[j], dm[i * B + j]);
#pragma unroll
  for (int j = 0; j < B; j++) { da[j] += flow[j]; s[j] = -a[j] * (a[j] * da[j]); }
  row_sums(m, s, flow);
#pragma unroll
  for (int i = 0; i < B; i++)
#pragma unroll
    for (int j = 0; j < B; j++) dm[i * B + j] = fused(b0[i], s[j], dm[i * B + j]);
#pragma unroll
  for (int k = 0; k < B; k++) {
    if (DAMPED) {  // before / (before * sum + eps) also depends on `before`
      real x = b[k] * approximate_reciprocal(b0[k]), y = a[k] * approximate_reciprocal(a0[k]);
      flow[k] = fused(eps * x * x, db[k], flow[k]);
      da[k] = eps * y * y * da[k];
    } else {
      da[k] = 0;
    }
    db[k] = flow[k];
  }
}

// A raised logit hands its gradient to the largest of its column; equal largest share it.
INLINE void pull_cap(const element* logits, i64 matrix, i64 batch, real range_cap, Place at, real (&d)[B * B]) {
  real x[B * B];
  read_block(logits, matrix, batch, at, x);
#pragma unroll
  for (int j = 0; j < B; j++) {
    real peak = minus_infinity(), taken = 0, ties = 0;
#pragma unroll
    for (int i = 0; i < B; i++) if (!PADDED || at.row * B + i < N) peak = larger(peak, x[i * B + j]);
    peak = max_over<ROW_STEP>(peak);
#pragma unroll
    for (int i = 0; i < B; i++) {
      if (PADDED && at.row * B + i >= N) continue;
      if (x[i * B + j] < peak - range_cap) { taken += d[i * B + j]; d[i * B + j] = 0; }
      if (x[i * B + j] == peak) ties += 1;
    }
    taken = sum_over<ROW_STEP>(taken);
    ties = sum_over<ROW_STEP>(ties);
#pragma unroll
    for (int i = 0; i < B; i++) if (x[i * B + j] == peak) d[i * B + j] += taken / ties;
  }
}

// The same on logarithms, for matrices that linear arithmetic cannot hold; the history holds the potentials. Overwrites
// their gradient.
SLOW void backward_on_logarithms(const element* logits, const element* grad, element* target, i64 matrix, i64 batch,
                                 int num_iters, int kept, real range_cap, real* history, bool wide) {
  Place at = place();
  real e[B * B], d[B * B], a[B], b[B], da[B], db[B];
  read_block(logits, matrix, batch, at, e);
  exponents(e, range_cap, at);
#pragma unroll 1
  for (int end = num_iters; end > 0; end -= kept) {
    int from = end > kept ? end - kept : 0;
#pragma unroll
    for (int k = 0; k < B; k++) a[k] = b[k] = 0;
#pragma unroll 1
    for (int t = 0; t < end; t++) {
      if (t >= from) keep(history, t - from, a, b);
      log_column_sums(e, b, a);
      log_row_sums(e, a, b);
    }
    if (end == num_iters) {
      read_block(grad, matrix, batch, at, d);
#pragma unroll
      for (int k = 0; k < B; k++) da[k] = db[k] = 0;
#pragma unroll
      for (int k = 0; k < B * B; k++) {
        d[k] *= exp_2(e[k] + a[k % B] + b[k / B]);
        da[k % B] += d[k];
        db[k / B] += d[k];
      }
#pragma unroll
      for (int k = 0; k < B; k++) { da[k] = sum_over<ROW_STEP>(da[k]); db[k] = sum_over<COLUMN_STEP>(db[k]); }
    }
#pragma unroll 1
    for (int t = end - 1; t >= from; t--) {
      real a0[B], b0[B], flow[B];
      recall(history, t - from, a0, b0);
#pragma unroll
      for (int k = 0; k < B; k++) flow[k] = 0;
#pragma unroll
      for (int k = 0; k < B * B; k++) {
        real x = exp_2(e[k] + a[k % B] + b[k / B]) * db[k / B];
        d[k] -= x;
        flow[k % B] += x;
      }
#pragma unroll
      for (int k = 0; k < B; k++) { da[k] -= sum_over<ROW_STEP>(flow[k]); flow[k] = 0; }
#pragma unroll
      for (int k = 0; k < B * B; k++) {
        real x = exp_2(e[k] + a[k % B] + b0[k / B]) * da[k % B];
        d[k] -= x;
        flow[k / B] += x;
      }
#pragma unroll
      for (int k = 0; k < B; k++) { db[k] = -sum_over<COLUMN_STEP>(flow[k]); da[k] = 0; a[k] = a0[k]; b[k] = b0[k]; }
    }
  }
  if (CAPPED) pull_cap(logits, matrix, batch, range_cap, at, d);
  if (wide) write_block(target, matrix, batch, at, d);
}

// m comes as the exponents and leaves as the gradient of the logits; dm comes as the gradient of the result (G = 1).
INLINE void pull(real (&m)[B * B], real (&dm)[B * B], const element* logits, const element* grad, i64 matrix, i64 batch,
                 int num_iters, int kept, real eps_start, real eps_den, real range_cap, real* history, Place at) {
  real a[B], b[B], da[B], db[B];
  start(m, eps_start, at);
  int full = DAMPED ? num_iters - 1 : num_iters;
  begin(m, a, b, eps_den, at);
  if (DAMPED && full == 0) {
    if (G > 1) read_block(grad, matrix, batch, at, dm);
    pull_result(m, a, b, dm, da, db);
  }
  for (int end = full; end > 0; end -= kept) {
    int from = end > kept ? end - kept : 0;
    if (end != full) begin(m, a, b, eps_den, at);
#pragma unroll 1
    for (int t = 0; t < from; t++) {
      column_step<0>(m, b, a, eps_den, at);
      row_step<0>(m, a, b, eps_den, at);
    }
#pragma unroll UNROLL
    for (int t = 0; t < end - from; t++) {
      keep(history, t, a, b);
      column_step<0>(m, b, a, eps_den, at);
      row_step<0>(m, a, b, eps_den, at);
    }
    if (end == full) {
      if (G > 1) read_block(grad, matrix, batch, at, dm);
      pull_result(m, a, b, dm, da, db);
    }
#pragma unroll UNROLL
    for (int t = end - from - 1; t >= 0; t--) {
      real a0[B], b0[B];
      recall(history, t, a0, b0);
      pull_iteration(m, a, b, a0, b0, dm, da, db, eps_den);
#pragma unroll
      for (int k = 0; k < B; k++) { a[k] = a0[k]; b[k] = b0[k]; }
    }
  }
  if (DAMPED) {  // the first division by rows, from scalings of one, then log(softmax + eps_start)
    real ones[B], lost[B];
#pragma unroll
    for (int k = 0; k < B; k++) { ones[k] = a[k] = 1; b[k] = 1; }
    row_step<0>(m, a, b, eps_den, at);
#pragma unroll
    for (int k = 0; k < B * B; k++) {
      real q = -b[k / B] * (b[k / B] * db[k / B]);
      bool inside = !PADDED || (at.row * B + k / B < N && at.column * B + k % B < N);
      m[k] = inside ? m[k] - eps_start : ZERO;
      dm[k] = m[k] * (dm[k] + q);
    }
    column_sums(dm, ones, lost);
#pragma unroll
    for (int k = 0; k < B * B; k++) m[k] = fused(-m[k], lost[k % B], dm[k]);
  } else {
#pragma unroll
    for (int k = 0; k < B * B; k++) m[k] *= dm[k];
  }
  if (CAPPED) pull_cap(logits, matrix, batch, range_cap, at, m);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
sinkhorn_backward(const element* __restrict__ logits, const element* __restrict__ grad_matrix,
                  element* __restrict__ grad_logits, i64 batch, int num_iters, int kept, real eps_start, real eps_den,
                  real range_cap) {
  extern __shared__ __align__(16) unsigned char memory[];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sub = lane / (G * G);
  int history_bytes = kept * 2 * B * 32 * (int)sizeof(real);
  int warp_bytes = history_bytes > 2 * TILE_BYTES ? history_bytes : 2 * TILE_BYTES;
  unsigned char* mine = memory + warp * warp_bytes;
  real* history = (real*)mine;
  i64 tile = (i64)blockIdx.x * (THREADS / 32) + warp, step = (i64)gridDim.x * (THREADS / 32);
  Place at = place();
  real m[B * B], g[B * B];
  for (; tile * PER_WARP < batch; tile += step) {
    if (G == 1) {
      fetch_tile(mine, logits, tile * 32, batch);
      fetch_tile(mine + TILE_BYTES, grad_matrix, tile * 32, batch);
      wait_tile<0>();
      read_tile(mine, m);
      read_tile(mine + TILE_BYTES, g);
      __syncwarp();
      i64 matrix = tile * 32 + lane;
      exponents(m, range_cap, at);
      bool wide = !DAMPED && !(lowest(m, at) >= LINEAR_TO);
      pull(m, g, logits, grad_matrix, matrix, batch, num_iters, kept, eps_start, eps_den, range_cap, history, at);
      __syncwarp();
      write_tile(mine, m, grad_logits, tile * 32, batch);
      if (!DAMPED && __any_sync(~0u, wide))
        backward_on_logarithms(logits, grad_matrix, grad_logits, matrix, batch, num_iters, kept, range_cap, history, wide);
    } else {
      i64 matrix = tile * PER_WARP + sub;
      read_block(logits, matrix, batch, at, m);
      exponents(m, range_cap, at);
      bool wide = !DAMPED && !(lowest(m, at) >= LINEAR_TO);
      pull(m, g, logits, grad_matrix, matrix, batch, num_iters, kept, eps_start, eps_den, range_cap, history, at);
      write_block(grad_logits, matrix, batch, at, m);
      if (!DAMPED && __any_sync(~0u, wide))
        backward_on_logarithms(logits, grad_matrix, grad_logits, matrix, batch, num_iters, kept, range_cap, history, wide);
    }
  }
}

#endif
