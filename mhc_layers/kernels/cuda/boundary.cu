// The write of one site and the projection of the next, in one read of the streams.
//
//   x'[t,o,c]   = sum_i h_res[t,o,i] x[t,i,c] + h_post[t,o] f[t,c]            rounded to bf16
//   slab[t,j]   = sum over o and the block's channels of x'[t,o,c] phi[j,o,c]  of the rounded x', with phi in two bf16 terms
//   square[t]   = sum over o and the block's channels of x'[t,o,c]^2
// DELAYED (single pass, the next site reads with this site's h_pre):
//   u[t,c]      = sum_o h_pre[t,o] x'[t,o,c]                                   of the rounded x'
//
// A block owns BLOCK_C channels of all streams, keeps their part of phi in shared memory and walks tiles of TOKENS tokens.
// In a warp lane/4 is a pair of tokens (p, p + 8) and lane%4 eight neighbouring channels. The contraction may take channels
// in any order, so the words stored as x' are already the tensor core's left operand. Its accumulators are a few registers,
// because all channels and streams of a token sum into the same N numbers; the warps' shares are joined in shared memory
// in a fixed order.
#ifdef DELAYED
constexpr bool DELAY = true;
#else
constexpr bool DELAY = false;
#endif
constexpr int TOKENS = 16;
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int WARP_C = 32, BLOCK_C = WARPS * WARP_C;
constexpr int STAGES = 2;
constexpr int ROW = 2 * BLOCK_C, PITCH = ROW + 64;     // bytes; the padding makes the lanes' reads free of conflicts
constexpr int SEGMENT = TOKENS * PITCH;                // one stream of one tile
constexpr int SEGMENTS = n + 1;                        // x[n] | f
// a token's coefficients in shared memory: h_post | h_res | h_pre
constexpr int AT_RES = n, AT_PRE = n + n * n, COEFFICIENTS = AT_PRE + (DELAY ? n : 0);
constexpr int COEFFICIENT_PITCH = (COEFFICIENTS + 3) / 8 * 8 + 4;
constexpr int STAGE = SEGMENTS * SEGMENT + TOKENS * COEFFICIENT_PITCH * 4;
constexpr int PHI_PIECES = WARPS * n * JT * 32;        // of 16 bytes, for one of phi's two terms
constexpr int PHI_BYTES = 2 * PHI_PIECES * 16;
constexpr int SHARE_PITCH = 8 * JT + 2;                // a warp's share of one token: N sums | square
static_assert(SHARED_BYTES == PHI_BYTES + STAGES * STAGE + 2 * WARPS * TOKENS * SHARE_PITCH * 4,
              "the launcher asks for the layout's bytes");
static_assert(SHARED_BYTES <= 232448, "tiles and phi must fit in a multiprocessor's shared memory");

// phi[N, n, C] fp32 -> the tensor core's operand order, both terms, each warp its own channels: piece
// (warp, o, jt, lane) holds phi[8 jt + p] at stream o and the eight channels that the lanes with this q hold
DEVICE void load_phi(const float* phi, uint4* terms, int channel0) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int channel = channel0 + warp * WARP_C + (lane & 3) * 8;
#pragma unroll
  for (int o = 0; o < n; o++)
#pragma unroll
    for (int jt = 0; jt < JT; jt++) {
      float v[8];
      load_floats<4>(v, phi, 8 * jt + (lane >> 2), o, channel);
      load_floats<4>(v + 4, phi, 8 * jt + (lane >> 2), o, channel + 4);
      uint4 hi, lo;
      split(v[0], v[1], hi.x, lo.x), split(v[2], v[3], hi.y, lo.y);
      split(v[4], v[5], hi.z, lo.z), split(v[6], v[7], hi.w, lo.w);
      const int at = ((warp * n + o) * JT + jt) * 32 + lane;
      terms[at] = hi, terms[PHI_PIECES + at] = lo;
    }
}

// Pieces of 2 * VEC bytes of the rows, several a thread. Where blocks have no channels to spare, tokens past the end repeat
// the last one: nothing of them is stored.
constexpr int PIECES = BLOCK_C / VEC;
constexpr bool EVEN = C % BLOCK_C == 0;
template <class F> DEVICE void each_piece(int token0, int M, int channel0, F f) {
#pragma unroll
  for (int at = threadIdx.x; at < TOKENS * PIECES; at += THREADS) {
    const int row = at / PIECES, piece = at % PIECES, channel = channel0 + piece * VEC;
    f(row * PITCH + piece * VEC * 2, token0 + row, channel, token0 + row < M && (EVEN || channel < C));
  }
}
DEVICE void copy_piece(unsigned char* to, const u16* from, bool valid) {
  if constexpr (EVEN) copy_async(to, from);
  else copy_async<2 * VEC>(to, from, valid);
}

// coef[t] = h_pre | h_post | h_res; here h_pre comes last, or not at all
constexpr int WIDTH = n % 4 == 0 ? 4 : 1, GROUPS = COEFFICIENTS / WIDTH;
static_assert(TOKENS * GROUPS <= THREADS, "each thread copies one piece of the coefficients");

DEVICE void load_tile(unsigned char* stage, const u16* x, const u16* f, const float* coef, int token0, int M, int channel0) {
  each_piece(token0, M, channel0, [&](int byte, int token, int channel, bool valid) {
    const i64 row = EVEN ? min(token, M - 1) : token;
#pragma unroll
    for (int i = 0; i < n; i++) copy_piece(stage + byte + i * SEGMENT, x + row * K + i * C + channel, valid);
    copy_piece(stage + byte + n * SEGMENT, f + row * C + channel, valid);
  });
  if (threadIdx.x < TOKENS * GROUPS) {
    const int row = threadIdx.x / GROUPS, col = threadIdx.x % GROUPS * WIDTH;
    copy_async<4 * WIDTH>((float*)(stage + SEGMENTS * SEGMENT) + row * COEFFICIENT_PITCH + col,
                          coef + (i64)(token0 + row) * N + (col < AT_PRE ? n + col : col - AT_PRE), token0 + row < M);
  }
}

// The lines of 128 bytes of a tile to the L2 cache, one by one thread
DEVICE void prefetch_tile(const u16* x, const u16* f, int token0, int M, int channel0) {
  each_piece(token0, M, channel0, [&](int, int token, int channel, bool valid) {
    if (!valid || channel % 64) return;
#pragma unroll
    for (int i = 0; i < n; i++) prefetch(x + (i64)token * K + i * C + channel);
    prefetch(f + (i64)token * C + channel);
  });
}

DEVICE void store_tile(const unsigned char* stage, u16* out, u16* u, int token0, int M, int channel0) {
  each_piece(token0, M, channel0, [&](int byte, int token, int channel, bool valid) {
    if (!valid) return;
#pragma unroll
    for (int o = 0; o < n; o++) store_row(out + (i64)token * K + o * C + channel, stage + byte + o * SEGMENT);
    if (DELAY) store_row(u + (i64)token * C + channel, stage + byte + n * SEGMENT);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
boundary_forward_kernel(const u16* x, const u16* f, const float* coef, const float* phi, u16* out, u16* u, float* slabs,
                        float* squares, int M) {
  extern __shared__ __align__(128) unsigned char shared[];
  uint4* terms = (uint4*)shared;
  unsigned char* stages = shared + PHI_BYTES;
  float* shares = (float*)(stages + STAGES * STAGE);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3, p = lane >> 2;
  const int tiles = (int)(((i64)M + TOKENS - 1) / TOKENS), channel0 = blockIdx.x * BLOCK_C;
  // blocks take tiles in turn, so that all of them are near each other in memory
  const int splits = gridDim.y, count = (tiles - (int)blockIdx.y + splits - 1) / splits;
  const uint4* phi_hi = terms + warp * (n * JT * 32) + lane;
  const uint4* phi_lo = phi_hi + PHI_PIECES;
  auto first_token = [&](int it) { return ((int)blockIdx.y + it * splits) * TOKENS; };
  auto load = [&](int it) {
    if (it < count) load_tile(stages + it % STAGES * STAGE, x, f, coef, first_token(it), M, channel0);
    copies_commit();
  };
#pragma unroll
  for (int it = 0; it < STAGES - 1; it++) load(it);
  load_phi(phi, terms, channel0);

  for (int it = 0; it < count; it++) {
    unsigned char* stage = stages + it % STAGES * STAGE;
    copies_wait<STAGES - 2>();
    __syncthreads();
    load(it + STAGES - 1);
    if (it + STAGES < count) prefetch_tile(x, f, first_token(it + STAGES), M, channel0);
    unsigned char* mine = stage + p * PITCH + warp * WARP_C * 2 + q * 16;  // token p; token p + 8 is 8 rows on
    const float* coefficients = (const float*)(stage + SEGMENTS * SEGMENT) + p * COEFFICIENT_PITCH;
    uint4 xw[n][2], fw[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      fw[k] = *(const uint4*)(mine + n * SEGMENT + 8 * k * PITCH);
#pragma unroll
      for (int i = 0; i < n; i++) xw[i][k] = *(const uint4*)(mine + i * SEGMENT + 8 * k * PITCH);
    }
    float sums[JT][4], square[2] = {0.f, 0.f}, read[DELAY ? 16 : 1];
#pragma unroll
    for (int a = 0; a < 4 * JT; a++) (&sums[0][0])[a] = 0.f;
    if (DELAY)
#pragma unroll
      for (int a = 0; a < 16; a++) read[DELAY ? a : 0] = 0.f;
#pragma unroll
    for (int o = 0; o < n; o++) {
      u32 y[2][4];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float* h = coefficients + 8 * k * COEFFICIENT_PITCH;
        const float post = h[o], pre = DELAY ? h[AT_PRE + o] : 0.f;
        float res[n];
        if constexpr (n == 4) *(float4*)res = *(const float4*)(h + AT_RES + o * n);
        else
#pragma unroll
          for (int i = 0; i < n; i++) res[i] = h[AT_RES + o * n + i];
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const u32 word = (&fw[k].x)[w];
          float l = post * low(word), m = post * high(word);
#pragma unroll
          for (int i = 0; i < n; i++) {
            const u32 v = (&xw[i][k].x)[w];
            l = fmaf(res[i], low(v), l), m = fmaf(res[i], high(v), m);
          }
          y[k][w] = pack(l, m);
          l = low(y[k][w]), m = high(y[k][w]);
          square[k] = fmaf(m, m, fmaf(l, l, square[k]));
          if (DELAY) {
            float* r = read + (DELAY ? 8 * k + 2 * w : 0);
            r[0] = fmaf(pre, l, r[0]), r[DELAY ? 1 : 0] = fmaf(pre, m, r[DELAY ? 1 : 0]);
          }
        }
        *(uint4*)(mine + o * SEGMENT + 8 * k * PITCH) = make_uint4(y[k][0], y[k][1], y[k][2], y[k][3]);
      }
#pragma unroll
      for (int jt = 0; jt < JT; jt++) {
        const uint4 hi = phi_hi[(o * JT + jt) * 32], lo = phi_lo[(o * JT + jt) * 32];
        mma16(sums[jt], y[0][0], y[1][0], y[0][1], y[1][1], hi.x, hi.y);
        mma16(sums[jt], y[0][2], y[1][2], y[0][3], y[1][3], hi.z, hi.w);
        mma16(sums[jt], y[0][0], y[1][0], y[0][1], y[1][1], lo.x, lo.y);
        mma16(sums[jt], y[0][2], y[1][2], y[0][3], y[1][3], lo.z, lo.w);
      }
    }
    float* share = shares + ((it & 1) * WARPS + warp) * TOKENS * SHARE_PITCH;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      square[k] += __shfl_xor_sync(~0u, square[k], 1);
      square[k] += __shfl_xor_sync(~0u, square[k], 2);
      float* row = share + (p + 8 * k) * SHARE_PITCH;
      if (q == 0) row[8 * JT] = square[k];
#pragma unroll
      for (int jt = 0; jt < JT; jt++) *(float2*)(row + 8 * jt + 2 * q) = make_float2(sums[jt][2 * k], sums[jt][2 * k + 1]);
      if (DELAY) {
        const float* r = read + (DELAY ? 8 * k : 0);
        *(uint4*)(mine + n * SEGMENT + 8 * k * PITCH) =
            make_uint4(pack(r[0], r[DELAY ? 1 : 0]), pack(r[DELAY ? 2 : 0], r[DELAY ? 3 : 0]),
                       pack(r[DELAY ? 4 : 0], r[DELAY ? 5 : 0]), pack(r[DELAY ? 6 : 0], r[DELAY ? 7 : 0]));
      }
    }
    __syncthreads();
    const int token0 = first_token(it);
    store_tile(stage, out, u, token0, M, channel0);
    const float* tile_shares = shares + (it & 1) * WARPS * TOKENS * SHARE_PITCH;
    for (int at = threadIdx.x; at < TOKENS * (N + 1); at += THREADS) {
      const int row = at / (N + 1), j = at % (N + 1);
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) total += tile_shares[(w * TOKENS + row) * SHARE_PITCH + (j < N ? j : 8 * JT)];
      const i64 token = (i64)blockIdx.x * M + token0 + row;
      if (token0 + row < M) {
        if (j < N) slabs[token * N + j] = total;
        else squares[token] = total;
      }
    }
  }
}
