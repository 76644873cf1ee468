// A batch of N x N matrices over the lanes of a warp: arithmetic, sums over lanes, half steps of Sinkhorn, memory.
// Specialised at run time by -D options; sinkhorn.py puts this text before that of sinkhorn.cu.
//   N            size of a matrix, 1..32
//   GR, GC       a matrix is spread over a grid of GR x GC lanes, each holding a block of BR x BC entries (1, 1: one a lane)
//   ELEMENT      type in memory: 0 float, 1 bfloat16, 2 half, 3 double
//   DAMPED       1: DeepSeek's recurrence, softmax + eps_start and eps_den in each sum
//   ROWS_FIRST   1: rows are normalised first; the matrix is read and written transposed and everything below is unchanged
//   CAPPED       1: logits further than range_cap below the largest of their column are raised to it
//   BACKWARD     which of the two kernels
//   THREADS, BLOCKS   launch bounds
//   PAIRS_A, PAIRS_B  how many pairs of sums share a reciprocal in the column step and in the row step of the forward
//   HELD         iterations whose scalings the backward keeps in registers
//
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

constexpr int BR = (N + GR - 1) / GR, BC = (N + GC - 1) / GC, LANES = GR * GC;
constexpr int MATRIX_BYTES = N * N * (int)sizeof(element);
constexpr int PER_WARP = 32 / LANES;  // matrices a warp holds
constexpr bool PADDED = BR * GR != N || BC * GC != N;
constexpr real LOG2E = (real)1.4426950408889634;
constexpr int UNROLL = BR * BC <= 32 ? 4 : 1, USUAL = 20;  // this many iterations are unrolled as a whole
typedef real Block[BR * BC];  // row-major
typedef real Rows[BR];        // one number a row of the block
typedef real Columns[BC];

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
#if __CUDA_ARCH__ >= 800
INLINE element narrow(real x) { u16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
INLINE element narrow(real x) {
  u32 bits = __float_as_uint(x);
  return x != x ? 0x7fff : (element)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#endif
#else
INLINE real widen(element x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
INLINE element narrow(real x) { u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The lane's place in the grid that holds its matrix, and sums over that grid

// Where a row in memory is a whole number of 16-byte pieces for each lane, the lanes take the pieces in turn, so that
// neighbouring lanes read neighbouring pieces; otherwise a lane's block is contiguous. Memory's columns are this file's
// columns, or its rows when ROWS_FIRST.
constexpr int ALONG = ROWS_FIRST ? BR : BC, SHARERS = ROWS_FIRST ? GR : GC, EACH = 16 / (int)sizeof(element);
constexpr bool IN_TURN = LANES > 1 && ALONG % EACH == 0 && ALONG * SHARERS == N;

struct Place {
  int block_row, block_column;
  INLINE int line(int k, int block, bool along_memory, int extent, int sharers) const {
    return along_memory && IN_TURN ? (k / EACH * sharers + block) * EACH + k % EACH : block * extent + k;
  }
  INLINE int row(int i) const { return line(i, block_row, ROWS_FIRST, BR, GR); }
  INLINE int column(int j) const { return line(j, block_column, !ROWS_FIRST, BC, GC); }
  INLINE bool has_row(int i) const { return BR * GR == N || row(i) < N; }
  INLINE bool has_column(int j) const { return BC * GC == N || column(j) < N; }
  INLINE bool has(int i, int j) const { return has_row(i) && has_column(j); }
};

INLINE Place place() {
  int sub = (int)(threadIdx.x & 31) % LANES;
  return ROWS_FIRST ? Place{sub % GR, sub / GR} : Place{sub / GC, sub % GC};
}
// Lanes that share a block column differ by ROW_STEP, lanes that share a block row by COLUMN_STEP.
constexpr int ROW_STEP = ROWS_FIRST ? 1 : GC, COLUMN_STEP = ROWS_FIRST ? GR : 1;

INLINE real sum_over_rows(real x) {
#pragma unroll
  for (int k = 1; k < GR; k *= 2) x += __shfl_xor_sync(~0u, x, k * ROW_STEP);
  return x;
}
INLINE real sum_over_columns(real x) {
#pragma unroll
  for (int k = 1; k < GC; k *= 2) x += __shfl_xor_sync(~0u, x, k * COLUMN_STEP);
  return x;
}
INLINE real max_over_rows(real x) {
#pragma unroll
  for (int k = 1; k < GR; k *= 2) x = larger(x, __shfl_xor_sync(~0u, x, k * ROW_STEP));
  return x;
}
INLINE real max_over_columns(real x) {
#pragma unroll
  for (int k = 1; k < GC; k *= 2) x = larger(x, __shfl_xor_sync(~0u, x, k * COLUMN_STEP));
  return x;
}

// s_j = sum_i m_ij v_i
INLINE void column_sums(const Block &m, const Rows &v, Columns &s) {
#pragma unroll
  for (int j = 0; j < BC; j++) {
    real x = m[j] * v[0];
#pragma unroll
    for (int i = 1; i < BR; i++) x = fused(m[i * BC + j], v[i], x);
    s[j] = sum_over_rows(x);
  }
}
// s_i = sum_j m_ij v_j
INLINE void row_sums(const Block &m, const Columns &v, Rows &s) {
#pragma unroll
  for (int i = 0; i < BR; i++) {
    real x = m[i * BC] * v[0];
#pragma unroll
    for (int j = 1; j < BC; j++) x = fused(m[i * BC + j], v[j], x);
    s[i] = sum_over_columns(x);
  }
}
// m_ij v_j and m_ij v_i
INLINE void scale_columns(Block &m, const Columns &v) {
#pragma unroll
  for (int k = 0; k < BR * BC; k++) m[k] *= v[k % BC];
}
INLINE void scale_rows(Block &m, const Rows &v) {
#pragma unroll
  for (int k = 0; k < BR * BC; k++) m[k] *= v[k / BC];
}
template <int COUNT> INLINE void copy(real (&to)[COUNT], const real (&from)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; k++) to[k] = from[k];
}
template <int COUNT> INLINE void fill(real (&v)[COUNT], real value) {
#pragma unroll
  for (int k = 0; k < COUNT; k++) v[k] = value;
}

// ---------------------------------------------------------------------------------------------------------------------
// Start

// Logits to exponents of two below the largest of each column. The subtracted constant cancels in the first normalisation,
// so its rounding does not matter; product and subtraction are one fused operation.
INLINE void exponents(Block &e, real range_cap, Place at) {
#pragma unroll
  for (int j = 0; j < BC; j++) {
    real peak = minus_infinity();
#pragma unroll
    for (int i = 0; i < BR; i++) if (at.has_row(i)) peak = larger(peak, e[i * BC + j]);
    peak = max_over_rows(peak);
    if (peak == minus_infinity()) peak = 0;
    real offset = peak * LOG2E;
#pragma unroll
    for (int i = 0; i < BR; i++) {
      real x = e[i * BC + j], y = fused(x, LOG2E, -offset);
      if (CAPPED && x < peak - range_cap) y = -range_cap * LOG2E;
      e[i * BC + j] = at.has(i, j) ? y : minus_infinity();
    }
  }
}

// The lowest exponent of the lane's matrix.
INLINE real lowest(const Block &e, Place at) {
  real low = 0;
#pragma unroll
  for (int k = 0; k < BR * BC; k++) if (at.has(k / BC, k % BC)) low = smaller(low, e[k]);
  return -max_over_columns(max_over_rows(-low));
}

// K = 2^e; for the damped recurrence softmax + eps_start.
INLINE void start(Block &m, real eps_start, Place at) {
#pragma unroll
  for (int k = 0; k < BR * BC; k++) m[k] = exp_2(m[k]);
  if (DAMPED) {
    Rows ones;
    Columns s;
    fill(ones, 1);
    column_sums(m, ones, s);
#pragma unroll
    for (int j = 0; j < BC; j++) s[j] = rounded_reciprocal(s[j] == ZERO ? ONE : s[j]);
#pragma unroll
    for (int k = 0; k < BR * BC; k++) m[k] = at.has(k / BC, k % BC) ? m[k] * s[k % BC] + eps_start : ZERO;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Half steps

// 1/s, the first 2 * PAIRS of them two to a reciprocal.
template <int PAIRS, int COUNT> INLINE void invert(real (&s)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    if (k + 1 < COUNT && k % 2 == 0 && k / 2 < PAIRS) {
      real x = s[k], both = approximate_reciprocal(x * s[k + 1]);
      s[k] = both * s[k + 1];
      s[k + 1] = both * x;
    } else if (k / 2 >= PAIRS || (k == COUNT - 1 && COUNT % 2)) {
      s[k] = approximate_reciprocal(s[k]);
    }
  }
}
// before / (before * s + eps)
template <int COUNT> INLINE void damp(real (&s)[COUNT], const real (&before)[COUNT], real eps) {
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    real total = fused(before[k], s[k], eps);
    s[k] = before[k] * approximate_reciprocal(total == ZERO ? ONE : total);
  }
}
// Padding's sums count as one, so that its scalings stay finite.
template <int PAIRS> INLINE void column_step(const Block &m, const Rows &b, Columns &a, real eps, Place at) {
  Columns s;
  column_sums(m, b, s);
#pragma unroll
  for (int j = 0; j < BC; j++) if (!at.has_column(j)) s[j] = 1;
  if (DAMPED) damp(s, a, eps); else invert<PAIRS>(s);
#pragma unroll
  for (int j = 0; j < BC; j++) a[j] = s[j];
}
template <int PAIRS> INLINE void row_step(const Block &m, const Columns &a, Rows &b, real eps, Place at) {
  Rows s;
  row_sums(m, a, s);
#pragma unroll
  for (int i = 0; i < BR; i++) if (!at.has_row(i)) s[i] = 1;
  if (DAMPED) damp(s, b, eps); else invert<PAIRS>(s);
#pragma unroll
  for (int i = 0; i < BR; i++) b[i] = s[i];
}
// Scalings before the first full iteration (the damped recurrence has divided its rows once by then).
INLINE void begin(const Block &m, Columns &a, Rows &b, real eps, Place at) {
  fill(a, 1);
  fill(b, 1);
  if (DAMPED) row_step<0>(m, a, b, eps, at);
}

// m over its row sums, which are then one within N + 1 roundings; a row of zeros stays.
INLINE void divide_rows(Block &m) {
  Rows s;
#pragma unroll
  for (int i = 0; i < BR; i++) {
    real x = m[i * BC];
#pragma unroll
    for (int j = 1; j < BC; j++) x += m[i * BC + j];
    x = sum_over_columns(x);
    s[i] = rounded_reciprocal(x == ZERO ? ONE : x);
  }
  scale_rows(m, s);
}

// -log2 of the sums of 2^(e + v) over each column (v by row); zero for a column of zeros, which then stays.
INLINE void log_column_sums(const Block &e, const Rows &v, Columns &a) {
#pragma unroll
  for (int j = 0; j < BC; j++) {
    real peak = minus_infinity(), s = 0;
#pragma unroll
    for (int i = 0; i < BR; i++) peak = larger(peak, e[i * BC + j] + v[i]);
    peak = max_over_rows(peak);
    if (peak == minus_infinity()) peak = 0;
#pragma unroll
    for (int i = 0; i < BR; i++) s += exp_2(e[i * BC + j] + v[i] - peak);
    s = sum_over_rows(s);
    a[j] = s == ZERO ? ZERO : -peak - log_2(s);
  }
}
INLINE void log_row_sums(const Block &e, const Columns &v, Rows &b) {
#pragma unroll
  for (int i = 0; i < BR; i++) {
    real peak = minus_infinity(), s = 0;
#pragma unroll
    for (int j = 0; j < BC; j++) peak = larger(peak, e[i * BC + j] + v[j]);
    peak = max_over_columns(peak);
    if (peak == minus_infinity()) peak = 0;
#pragma unroll
    for (int j = 0; j < BC; j++) s += exp_2(e[i * BC + j] + v[j] - peak);
    s = sum_over_columns(s);
    b[i] = s == ZERO ? ZERO : -peak - log_2(s);
  }
}
INLINE void shift_columns(Block &e, const Columns &v) {
#pragma unroll
  for (int k = 0; k < BR * BC; k++) e[k] += v[k % BC];
}
INLINE void shift_rows(Block &e, const Rows &v) {
#pragma unroll
  for (int k = 0; k < BR * BC; k++) e[k] += v[k / BC];
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory. One matrix a lane: the 32 matrices of a warp are contiguous; they travel in 16-byte pieces through shared memory,
// placed so that neither side meets a bank twice. Several lanes a matrix: each lane reads and writes its block.

constexpr int PIECES = MATRIX_BYTES / 16, TILE_PIECES = LANES == 1 ? 2 * MATRIX_BYTES : 0, TILE_BYTES = 16 * TILE_PIECES;
constexpr bool IN_PIECES = MATRIX_BYTES % 16 == 0;
constexpr bool SWIZZLED = IN_PIECES && (PIECES & (PIECES - 1)) == 0 && PIECES > 1;

INLINE int entry(int i, int j) { return ROWS_FIRST ? j * N + i : i * N + j; }

// Where piece p of the tile lies in shared memory.
INLINE int piece_at(int p) {
  if (!SWIZZLED) return p;
  constexpr int EACH_MATRIX = SWIZZLED ? PIECES : 1, SPREAD = EACH_MATRIX >= 8 ? 8 : EACH_MATRIX;
  int matrix = p / EACH_MATRIX, piece = p % EACH_MATRIX;
  return matrix * EACH_MATRIX + (piece ^ ((matrix * SPREAD / 8) & (SPREAD - 1)));
}

// The same for piece 32 k + lane, with a constant between one k and the next where the placing allows it.
INLINE int own_piece_at(int k) {
  int lane = threadIdx.x & 31;
  return PIECES <= 4 || !SWIZZLED ? piece_at(lane) + 32 * k : piece_at(32 * k + lane);
}
// Piece p of the lane's own matrix.
INLINE int matrix_piece_at(int p) {
  int begin = (int)(threadIdx.x & 31) * PIECES;
  return SWIZZLED ? piece_at(begin) ^ p : begin + p;
}
INLINE bool has_piece(int k) { return TILE_PIECES % 32 == 0 || k * 32 + (int)(threadIdx.x & 31) < TILE_PIECES; }

// Start copying 16 bytes to shared memory, of which so many are read and the rest is zero.
INLINE void fetch_piece(unsigned char* to, const unsigned char* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  for (int k = 0; k < 16; k++) to[k] = k < bytes ? from[k] : 0;
#endif
}
// Start copying the warp's tile; bytes beyond the batch read as zero. A tile that lies in the batch is copied without bounds.
INLINE void fetch_tile(unsigned char* shared, const element* source, i64 first, i64 batch) {
  const unsigned char* from = (const unsigned char*)(source + first * (N * N)) + (threadIdx.x & 31) * 16;
  if (first + 32 <= batch) {
#pragma unroll
    for (int k = 0; k < (TILE_PIECES + 31) / 32; k++)
      if (has_piece(k)) fetch_piece(shared + own_piece_at(k) * 16, from + k * 512, 16);
    return;
  }
  i64 left = (const unsigned char*)(source + batch * (N * N)) - from;
#pragma unroll 1
  for (int k = 0; k < (TILE_PIECES + 31) / 32; k++) {
    i64 here = left - k * 512;
    int bytes = here >= 16 ? 16 : here > 0 ? (int)here : 0;
    if (has_piece(k)) fetch_piece(shared + own_piece_at(k) * 16, bytes ? from + k * 512 : (const unsigned char*)source, bytes);
  }
}
INLINE void wait_tile() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncwarp();
}
// The lane's own matrix, from and to shared memory.
INLINE void read_tile(const unsigned char* shared, Block &m) {
  int lane = threadIdx.x & 31;
  if (IN_PIECES) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      uint4 word = *(const uint4*)(shared + matrix_piece_at(p) * 16);
      const element* x = (const element*)&word;
#pragma unroll
      for (int k = 0; k < EACH; k++) m[entry((p * EACH + k) / N, (p * EACH + k) % N)] = widen(x[k]);
    }
  } else {
    const element* x = (const element*)shared + lane * (N * N);
#pragma unroll
    for (int k = 0; k < N * N; k++) m[entry(k / N, k % N)] = widen(x[k]);
  }
}
INLINE void write_tile(unsigned char* shared, const Block &m, element* target, i64 first, i64 batch) {
  int lane = threadIdx.x & 31;
  element* to = target + first * (N * N);
  if (first + 32 > batch) {
    if (first + lane < batch) {
#pragma unroll
      for (int k = 0; k < N * N; k++) to[(i64)lane * (N * N) + k] = narrow(m[entry(k / N, k % N)]);
    }
    return;
  }
  if (IN_PIECES) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      uint4 word;
      element* x = (element*)&word;
#pragma unroll
      for (int k = 0; k < EACH; k++) x[k] = narrow(m[entry((p * EACH + k) / N, (p * EACH + k) % N)]);
      *(uint4*)(shared + matrix_piece_at(p) * 16) = word;
    }
  } else {
    element* x = (element*)shared + lane * (N * N);
#pragma unroll
    for (int k = 0; k < N * N; k++) x[k] = narrow(m[entry(k / N, k % N)]);
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < (TILE_PIECES + 31) / 32; k++)
    if (has_piece(k)) __stcs((uint4*)to + k * 32 + lane, *(const uint4*)(shared + own_piece_at(k) * 16));
}

// The lane's block straight from and to global memory.
INLINE void read_block(const element* source, i64 matrix, i64 batch, Place at, Block &m) {
  const element* from = source + matrix * (N * N);
  constexpr int ACROSS = ROWS_FIRST ? BC : BR;
  bool exists = matrix < batch;
  if (IN_TURN) {
#pragma unroll
    for (int i = 0; i < ACROSS; i++)
#pragma unroll
      for (int p = 0; p < ALONG; p += EACH) {
        int offset = ROWS_FIRST ? at.column(i) * N + at.row(p) : at.row(i) * N + at.column(p);
        uint4 word = exists ? __ldg((const uint4*)(from + offset)) : make_uint4(0, 0, 0, 0);
        const element* x = (const element*)&word;
#pragma unroll
        for (int k = 0; k < EACH; k++) m[ROWS_FIRST ? (p + k) * BC + i : i * BC + p + k] = widen(x[k]);
      }
  } else {
#pragma unroll
    for (int k = 0; k < BR * BC; k++) {
      int i = k / BC, j = k % BC;
      m[k] = exists && at.has(i, j) ? widen(from[entry(at.row(i), at.column(j))]) : ZERO;
    }
  }
}
INLINE void write_block(element* target, i64 matrix, i64 batch, Place at, const Block &m) {
  element* to = target + matrix * (N * N);
  constexpr int ACROSS = ROWS_FIRST ? BC : BR;
  if (matrix >= batch) return;
  if (IN_TURN) {
#pragma unroll
    for (int i = 0; i < ACROSS; i++)
#pragma unroll
      for (int p = 0; p < ALONG; p += EACH) {
        int offset = ROWS_FIRST ? at.column(i) * N + at.row(p) : at.row(i) * N + at.column(p);
        uint4 word;
        element* x = (element*)&word;
#pragma unroll
        for (int k = 0; k < EACH; k++) x[k] = narrow(m[ROWS_FIRST ? (p + k) * BC + i : i * BC + p + k]);
        __stcs((uint4*)(to + offset), word);
      }
  } else {
#pragma unroll
    for (int k = 0; k < BR * BC; k++) {
      int i = k / BC, j = k % BC;
      if (at.has(i, j)) to[entry(at.row(i), at.column(j))] = narrow(m[k]);
    }
  }
}
