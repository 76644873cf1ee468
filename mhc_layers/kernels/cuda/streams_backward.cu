// The last backward step of a site and, CHAINED, the first one of the site before it, in one read of the streams.
//
//   dx[t,i,c]   = sum_o h_res[t,o,i] g[t,o,c] + h_pre[t,i] du[t,c] + rc[t] x[t,i,c] + sum_j dz[t,j] phi[j,i,c]
//   dphi[j,i,c] = sum_t dz[t,j] x[t,i,c]
// mix[t,i,:] holds h_res[t,:,i], h_pre[t,i], rc[t]; dz is given as two bf16 terms.
// CHAINED: x is what the site before wrote, so dx is the gradient of its write. With that site's input streams y, sublayer
// output f and projections proj (which give h_post, Eq. 16 and 18):
//   df[t,c] = sum_o h_post[t,o] dx[t,o,c]     dots[t,o,i] = <dx[t,o], y[t,i]>, and <dx[t,o], f[t]> for i = n
// of dx as it is stored.
//
// A block owns BLOCK_C channels of all streams and takes tiles of TOKENS tokens in turn with the other blocks of these
// channels: rows of 512 bytes travel through STAGES tiles of padded shared memory. In a warp lane%4 is a pair of tokens
// and lane/4 a group of channels, so that the registers holding x are, after one byte permutation, the tensor core's
// operand of dphi, and its result of dz phi lands where x, g and du of the same token and channel already are. dphi
// accumulates in registers over all tiles of the block and is written once, to the block's own slab; slabs are summed
// in a fixed order afterwards (no atomics).
#ifdef CHAINED
constexpr bool CHAIN = true;
#else
constexpr bool CHAIN = false;
#endif
constexpr int TOKENS = 8;
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int MT = n <= 4 ? 2 : 1;                     // 16-channel tensor-core tiles of a warp
constexpr int WARP_C = 16 * MT, BLOCK_C = WARPS * WARP_C;
constexpr int STAGES = CHAIN || n > 4 ? 2 : 3;
constexpr int ROW = 2 * BLOCK_C, PITCH = ROW + 16;     // bytes; the padding makes the lanes' reads free of conflicts
constexpr int SEGMENT = TOKENS * PITCH + 32;           // one stream of one tile
constexpr int SEGMENTS = 2 * n + 1 + (CHAIN ? n + 1 : 0);  // x[n] | g[n] | du | y[n] | f
constexpr int AT_G = n, AT_DU = 2 * n, AT_Y = 2 * n + 1, AT_F = 3 * n + 1;
constexpr int DOTS = n * (n + 1);                      // <dx[o], y[i]> and, in the last column, <dx[o], f>
static_assert(!CHAIN || TOKENS * DOTS <= THREADS, "each thread joins one inner product");
constexpr int P = MIX_COLUMNS, NP = DZ_COLUMNS;        // padded widths of mix and dz
// a token's numbers in shared memory, in words: mix | dz high | dz low | proj of post
constexpr int AT_DZ = n * P, AT_POST = AT_DZ + NP, NUMBERS = AT_POST + (CHAIN ? n : 0);
constexpr int NUMBERS_PITCH = (NUMBERS + 11) / 16 * 16 + 4;  // 4 mod 16: neighbouring tokens fall in different banks
constexpr int STAGE = SEGMENTS * SEGMENT + TOKENS * NUMBERS_PITCH * 4;
constexpr int PHI_BYTES = WARPS * n * MT * JT * 32 * 16;  // both terms
static_assert(SHARED_BYTES == PHI_BYTES + STAGES * STAGE + (CHAIN ? WARPS * TOKENS * DOTS * 4 : 0),
              "the launcher asks for the layout's bytes");
static_assert(SHARED_BYTES <= 232448, "tiles and phi must fit in a multiprocessor's shared memory");

struct Inputs {
  const u16 *x, *g, *du, *dz, *y, *f;
  const float *mix, *proj;
};

// phi[N, n, C] fp32 -> the tensor core's operand order, each warp its own channels. A lane's operand of 8 coefficients
// (8 jt + 2q, + 1 at channels 2 MT p + 2 mt, + 1) is two words; for each (warp, i, mt) there are JT quads a lane: the high
// terms of two jt, their low terms, and, where JT is odd, the last one's high and low term
DEVICE void load_phi(const float* phi, uint4* terms, int channel0) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3, p = lane >> 2;
  const int channel = channel0 + warp * WARP_C + p * 2 * MT;
#pragma unroll
  for (int i = 0; i < n; i++) {
    uint2 hi[MT][JT], lo[MT][JT];
#pragma unroll
    for (int jt = 0; jt < JT; jt++) {
      float v[2][2 * MT];
#pragma unroll
      for (int h = 0; h < 2; h++) load_floats<2 * MT>(v[h], phi, 8 * jt + 2 * q + h, i, channel);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        split(v[0][2 * mt], v[1][2 * mt], hi[mt][jt].x, lo[mt][jt].x);
        split(v[0][2 * mt + 1], v[1][2 * mt + 1], hi[mt][jt].y, lo[mt][jt].y);
      }
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      uint4* to = terms + ((warp * n + i) * MT + mt) * JT * 32 + lane;
#pragma unroll
      for (int jt = 0; jt + 1 < JT; jt += 2) {
        to[jt * 32] = make_uint4(hi[mt][jt].x, hi[mt][jt].y, hi[mt][jt + 1].x, hi[mt][jt + 1].y);
        to[(jt + 1) * 32] = make_uint4(lo[mt][jt].x, lo[mt][jt].y, lo[mt][jt + 1].x, lo[mt][jt + 1].y);
      }
      if (JT % 2)
        to[(JT - 1) * 32] = make_uint4(hi[mt][JT - 1].x, hi[mt][JT - 1].y, lo[mt][JT - 1].x, lo[mt][JT - 1].y);
    }
  }
}

// Rows travel in pieces of 2 * VEC bytes. Where blocks have no channels to spare, a thread copies one piece of a row, and
// tokens past the end repeat the last one: their dz is zero and nothing of them is stored.
constexpr int PIECES = BLOCK_C / VEC;
constexpr bool EVEN = C % BLOCK_C == 0;
static_assert(!EVEN || TOKENS * PIECES <= THREADS, "a thread copies at most one piece of a row");

// f(the piece's byte in a segment, its token, its channel, whether it exists)
template <class F> DEVICE void each_piece(int token0, int M, int channel0, F f) {
#pragma unroll
  for (int at = threadIdx.x; at < TOKENS * PIECES; at += THREADS) {
    const int row = at / PIECES, piece = at % PIECES, channel = channel0 + piece * VEC;
    f(row * PITCH + piece * VEC * 2, token0 + row, channel, token0 + row < M && (EVEN || channel < C));
    if (EVEN) break;
  }
}
DEVICE void copy_piece(unsigned char* to, const u16* from, bool valid) {
  if constexpr (EVEN) copy_async(to, from);
  else copy_async<2 * VEC>(to, from, valid);
}

// Where this thread's 16 bytes of the tokens' numbers come from, how many bytes a token has there, and where they go
struct Numbers {
  const unsigned char* from;
  int bytes, row, to;
};
constexpr int MIX_PIECES = n * P / 4, NUMBER_PIECES = MIX_PIECES + NP / 4;
static_assert(TOKENS * NUMBER_PIECES <= THREADS, "each thread copies one piece of the numbers");
DEVICE Numbers numbers_of_thread(const Inputs& in) {
  const int row = threadIdx.x / NUMBER_PIECES, piece = threadIdx.x % NUMBER_PIECES;
  const bool is_mix = piece < MIX_PIECES;
  return {is_mix ? (const unsigned char*)in.mix + piece * 16 : (const unsigned char*)in.dz + (piece - MIX_PIECES) * 16,
          is_mix ? n * P * 4 : NP * 4, row, row * NUMBERS_PITCH + piece * 4};
}

// One stream of a tile: x, g and y; with the first one du and f
DEVICE void load_stream(unsigned char* stage, const Inputs& in, int i, int token0, int M, int channel0) {
  each_piece(token0, M, channel0, [&](int byte, int token, int channel, bool valid) {
    const i64 row = EVEN ? min(token, M - 1) : token, from = row * K + i * C + channel;
    unsigned char* to = stage + byte;
    copy_piece(to + i * SEGMENT, in.x + from, valid);
    copy_piece(to + (AT_G + i) * SEGMENT, in.g + from, valid);
    if (CHAIN) copy_piece(to + (AT_Y + i) * SEGMENT, in.y + from, valid);
    if (i == 0) {
      copy_piece(to + AT_DU * SEGMENT, in.du + row * C + channel, valid);
      if (CHAIN) copy_piece(to + AT_F * SEGMENT, in.f + row * C + channel, valid);
    }
  });
}

// The lines of 128 bytes of a tile to the L2 cache, one by one thread
DEVICE void prefetch_tile(const Inputs& in, int token0, int M, int channel0) {
  each_piece(token0, M, channel0, [&](int, int token, int channel, bool valid) {
    if (!valid || channel % 64) return;
    const i64 streams = (i64)token * K + channel, row = (i64)token * C + channel;
#pragma unroll
    for (int i = 0; i < n; i++) {
      const i64 at = streams + i * C;
      prefetch(in.x + at), prefetch(in.g + at), prefetch(in.y + at);
    }
    prefetch(in.du + row), prefetch(in.f + row);
  });
}

DEVICE void load_numbers(unsigned char* stage, const Inputs& in, const Numbers& mine, int token0, int M) {
  u32* numbers = (u32*)(stage + SEGMENTS * SEGMENT);
  if (threadIdx.x < TOKENS * NUMBER_PIECES)
    copy_async<16>(numbers + mine.to, mine.from + (i64)(token0 + mine.row) * mine.bytes, token0 + mine.row < M);
  if (CHAIN && threadIdx.x >= THREADS - TOKENS * n) {
    const int at = threadIdx.x - (THREADS - TOKENS * n), row = at / n, o = at % n;
    copy_async<4>(numbers + row * NUMBERS_PITCH + AT_POST + o, in.proj + (i64)(token0 + row) * N + n + o, token0 + row < M);
  }
}

DEVICE void store_streams(const unsigned char* stage, u16* dx, u16* df, int token0, int M, int channel0) {
  each_piece(token0, M, channel0, [&](int byte, int token, int channel, bool valid) {
    if (!valid) return;
    const unsigned char* from = stage + byte;
#pragma unroll
    for (int i = 0; i < n; i++) store_row(dx + (i64)token * K + i * C + channel, from + i * SEGMENT);
    if (CHAIN) store_row(df + (i64)token * C + channel, from + AT_F * SEGMENT);
  });
}

DEVICE void read_words(u32* words, const unsigned char* from) {
  if constexpr (MT == 2) {
    uint2 w = *(const uint2*)from;
    words[0] = w.x, words[1] = w.y;
  } else {
    words[0] = *(const u32*)from;
  }
}
DEVICE void write_words(unsigned char* to, const u32* words) {
  if constexpr (MT == 2) *(uint2*)to = make_uint2(words[0], words[1]);
  else *(u32*)to = words[0];
}

// Eq. 16 and 18: lane n * row + o makes h_post[o] of the tile's token `row`
struct Gate {
  int at;
  float alpha, bias, multiplier;
};
DEVICE Gate gate_of_lane(const float* alpha, const float* bias, float multiplier, int lane) {
  const int k = min(lane, TOKENS * n - 1);
  return {k / n * NUMBERS_PITCH + AT_POST + k % n, __ldg(alpha), __ldg(bias + n + k % n), multiplier};
}
DEVICE float make_h_post(const float* numbers, const Gate& gate) {
  return __fdividef(gate.multiplier, 1.f + __expf(-fmaf(gate.alpha, numbers[gate.at], gate.bias)));
}
static_assert(!CHAIN || TOKENS * n <= 32, "a warp holds h_post of a tile");

// df of the site before, from dx (bf16, as stored) of the lane's two tokens and channels
DEVICE void write_df(unsigned char* mine, float lane_h_post, const u32 (*dx)[2][MT], int q) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float h_post[n];
#pragma unroll
    for (int o = 0; o < n; o++) h_post[o] = __shfl_sync(~0u, lane_h_post, (2 * q + e) * n + o);
    u32 df[MT];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      float l = 0.f, h = 0.f;
#pragma unroll
      for (int o = 0; o < n; o++)
        l = fmaf(h_post[o], low(dx[o][e][mt]), l), h = fmaf(h_post[o], high(dx[o][e][mt]), h);
      df[mt] = pack(l, h);
    }
    write_words(mine + AT_F * SEGMENT + e * PITCH, df);
  }
}

// Sum V values over the eight lanes of one token pair (lane bits 2-4). Each step halves what a lane keeps, so that
// lane p ends with the totals of values [first, first + V/8); returns first.
template <int V> DEVICE int sum_over_channels(float* v, int lane) {
  int first = 0;
#pragma unroll
  for (int step = 0; step < 3; step++) {
    const int half = V >> (step + 1);
    const bool upper = lane & (4 << step);
#pragma unroll
    for (int k = 0; k < V / 2; k++)
      if (k < half) {
        float send = upper ? v[k] : v[k + half], keep = upper ? v[k + half] : v[k];
        v[k] = keep + __shfl_xor_sync(~0u, send, 4 << step);
      }
    first += upper ? half : 0;
  }
  return first;
}
constexpr int DOTS_PADDED = (DOTS + 7) / 8 * 8;
// The inner products of a warp's channels: dots[o * (n + 1) + i] = <dx[o], y[i]>, with f for i = n
DEVICE void write_dots(const unsigned char* mine, const u32 (*dx)[2][MT], float* partial, int lane) {
  const int q = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float dots[DOTS_PADDED];
#pragma unroll
    for (int k = 0; k < DOTS_PADDED; k++) dots[k] = 0.f;
    u32 y[n + 1][MT];
#pragma unroll
    for (int i = 0; i <= n; i++) read_words(y[i], mine + (AT_Y + i) * SEGMENT + e * PITCH);
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int o = 0; o < n; o++) {
        const float l = low(dx[o][e][mt]), h = high(dx[o][e][mt]);
#pragma unroll
        for (int i = 0; i <= n; i++) {
          float& to = dots[o * (n + 1) + i];
          to = fmaf(h, high(y[i][mt]), fmaf(l, low(y[i][mt]), to));
        }
      }
    const int first = sum_over_channels<DOTS_PADDED>(dots, lane);
#pragma unroll
    for (int k = 0; k < DOTS_PADDED / 8; k++)
      if (first + k < DOTS) partial[(2 * q + e) * DOTS + first + k] = dots[k];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
streams_backward_kernel(const u16* x, const u16* g, const u16* du, const float* mix, const u16* dz, const float* phi,
                        const u16* y, const u16* f, const float* proj, const float* alpha_post, const float* bias,
                        float post_multiplier, u16* dx, float* dphi_slabs, u16* df, float* dots_slabs, int M) {
  extern __shared__ __align__(128) unsigned char shared[];
  uint4* terms = (uint4*)shared;
  unsigned char* stages = shared + PHI_BYTES;
  float* partials = (float*)(stages + STAGES * STAGE);
  const Inputs in = {x, g, du, dz, y, f, mix, proj};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3, p = lane >> 2;
  const int tiles = (int)(((i64)M + TOKENS - 1) / TOKENS);
  const int channel0 = blockIdx.x * BLOCK_C;
  // blocks take tiles in turn, so that all of them are near each other in memory
  const int splits = gridDim.y, count = (tiles - (int)blockIdx.y + splits - 1) / splits;
  const Numbers numbers_from = numbers_of_thread(in);
  const Gate gate = CHAIN ? gate_of_lane(alpha_post, bias, post_multiplier, lane) : Gate{};

  auto first_token = [&](int it) { return ((int)blockIdx.y + it * splits) * TOKENS; };
  auto load = [&](int it, int i) {  // stream i of a tile; the numbers with the first one
    if (it < count) {
      unsigned char* stage = stages + it % STAGES * STAGE;
      load_stream(stage, in, i, first_token(it), M, channel0);
      if (i == 0) load_numbers(stage, in, numbers_from, first_token(it), M);
    }
  };
#pragma unroll
  for (int it = 0; it < STAGES - 1; it++) {
#pragma unroll
    for (int i = 0; i < n; i++) load(it, i);
    copies_commit();
  }
  load_phi(phi, terms, channel0);
  float dphi[n][MT][JT][4];
#pragma unroll
  for (int k = 0; k < n * MT * JT * 4; k++) (&dphi[0][0][0][0])[k] = 0.f;
  const uint4* phi_quads = terms + warp * (n * MT * JT * 32) + lane;
  // dz in shared memory is 8 x 8 matrices: tokens by 8 coefficients jt, high or low term. Four are loaded at once, in the
  // order in which products take them: for phi dz the high terms of two jt, then their low ones; for x^T dz each jt's
  // high and low term. An odd last jt fills the place of its neighbour.
  constexpr int LOADS = (JT + 1) / 2;
  int z_from[LOADS], t_from[LOADS];
#pragma unroll
  for (int k = 0; k < LOADS; k++) {
    const int one = lane >> 3 & 1, two = lane >> 4, row = (lane & 7) * NUMBERS_PITCH + AT_DZ;
    z_from[k] = row + two * (NP / 2) + min(2 * k + one, JT - 1) * 4;
    t_from[k] = row + one * (NP / 2) + min(2 * k + two, JT - 1) * 4;
  }

  for (int it = 0; it < count; it++) {
    unsigned char* stage = stages + it % STAGES * STAGE;
    copies_wait<STAGES - 2>();  // this tile has arrived
    __syncthreads();
    unsigned char* mine = stage + 2 * q * PITCH + warp * WARP_C * 2 + p * 4 * MT;  // token 2q; the next row is 2q + 1
    const float* numbers = (const float*)(stage + SEGMENTS * SEGMENT);
    u32 gw[n][2][MT], uw[2][MT], out[n][2][MT];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      read_words(uw[e], mine + AT_DU * SEGMENT + e * PITCH);
#pragma unroll
      for (int o = 0; o < n; o++) read_words(gw[o][e], mine + (AT_G + o) * SEGMENT + e * PITCH);
    }
    // dz as the right operand of phi dz (token p, coefficients 2q) and of x^T dz (tokens 2q, coefficient p)
    u32 z[LOADS][4], t[LOADS][4];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
      load_matrices(z[k], numbers + z_from[k]);
      load_transposed(t[k], numbers + t_from[k]);
    }
#pragma unroll
    for (int i = 0; i < n; i++) {
      u32 xw[2][MT];
      read_words(xw[0], mine + i * SEGMENT);
      read_words(xw[1], mine + i * SEGMENT + PITCH);
      // sum_j dz phi: high x high + low x high + high x low
      float sum[MT][4];
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        const uint4* quads = phi_quads + (i * MT + mt) * JT * 32;
#pragma unroll
        for (int k = 0; k < JT / 2; k++) {
          const uint4 hi = quads[2 * k * 32], lo = quads[(2 * k + 1) * 32];
          mma16(sum[mt], hi.x, hi.y, hi.z, hi.w, z[k][0], z[k][1], k == 0);
          mma16(sum[mt], hi.x, hi.y, hi.z, hi.w, z[k][2], z[k][3]);
          mma16(sum[mt], lo.x, lo.y, lo.z, lo.w, z[k][0], z[k][1]);
        }
        if (JT % 2) {
          const uint4 both = quads[(JT - 1) * 32];
          mma16(sum[mt], both.x, both.y, both.z, both.w, z[LOADS - 1][0], z[LOADS - 1][1], JT == 1);
          mma8(sum[mt], both.x, both.y, z[LOADS - 1][2]);
        }
      }
      // + h_res^T g + h_pre du + rms x
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float* row = numbers + (2 * q + e) * NUMBERS_PITCH + i * P;
        float h[(n + 5) / 4 * 4];  // h_res[:, i], h_pre[i], rc
#pragma unroll
        for (int k = 0; k < n + 2; k += 4) *(float4*)(h + k) = *(const float4*)(row + k);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
          float l = fmaf(h[n + 1], low(xw[e][mt]), sum[mt][e]), m = fmaf(h[n + 1], high(xw[e][mt]), sum[mt][2 + e]);
          l = fmaf(h[n], low(uw[e][mt]), l), m = fmaf(h[n], high(uw[e][mt]), m);
#pragma unroll
          for (int o = 0; o < n; o++) l = fmaf(h[o], low(gw[o][e][mt]), l), m = fmaf(h[o], high(gw[o][e][mt]), m);
          out[i][e][mt] = pack(l, m);
        }
        write_words(mine + i * SEGMENT + e * PITCH, out[i][e]);  // over x, which only this lane reads
      }
      // dphi += x^T dz: the two tokens of a word pair side by side, x once for dz's high term and once for its low one
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        const u32 a0 = __byte_perm(xw[0][mt], xw[1][mt], 0x5410), a1 = __byte_perm(xw[0][mt], xw[1][mt], 0x7632);
#pragma unroll
        for (int jt = 0; jt < JT; jt++) {
          const u32* both = t[jt / 2] + jt % 2 * 2;  // high and low term
          mma16(dphi[i][mt][jt], a0, a1, a0, a1, both[0], both[1]);
        }
      }
      load(it + STAGES - 1, i);  // between products, not all at once: each waits for its turn at the memory
    }
    copies_commit();
    if (CHAIN) {
      if (it + STAGES < count) prefetch_tile(in, first_token(it + STAGES), M, channel0);
      write_dots(mine, out, partials + warp * TOKENS * DOTS, lane);
      write_df(mine, make_h_post(numbers, gate), out, q);
    }
    __syncthreads();
    const int token0 = first_token(it);
    store_streams(stage, dx, df, token0, M, channel0);
    const int at = threadIdx.x;
    if (CHAIN && at < TOKENS * DOTS && at < (M - token0) * DOTS) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) total += partials[w * TOKENS * DOTS + at];
      dots_slabs[((i64)blockIdx.x * M + token0) * DOTS + at] = total;
    }
  }

  float* slab = dphi_slabs + (i64)blockIdx.y * N * K;
  const int channel = channel0 + warp * WARP_C + p * 2 * MT;
#pragma unroll
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int jt = 0; jt < JT; jt++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int j = 8 * jt + 2 * q + e;
        if (j < N) {
          float* to = slab + (i64)j * K + i * C + channel;
          if constexpr (MT == 2 && C % 4 == 0) {
            if (channel < C)
              *(float4*)to = make_float4(dphi[i][0][jt][e], dphi[i][0][jt][2 + e], dphi[i][MT - 1][jt][e],
                                         dphi[i][MT - 1][jt][2 + e]);
          } else {
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
              for (int r = 0; r < 2; r++)
                if (channel + 2 * mt + r < C) to[2 * mt + r] = dphi[i][mt][jt][2 * r + e];
          }
        }
      }
}

// dcoef[t] = 0 (pre) | sum over channel blocks of dots[t], in their order
extern "C" __global__ void __launch_bounds__(256) sum_dots_kernel(const float* dots_slabs, float* dcoef, int count, int M) {
  const i64 k = (i64)blockIdx.x * 256 + threadIdx.x;
  if (k >= (i64)M * N) return;
  const i64 token = k / N;
  const int column = (int)(k % N), res = column - 2 * n;
  const int dot = res < 0 ? (column - n) * (n + 1) + n : res / n * (n + 1) + res % n;
  float total = 0.f;
  if (column >= n) {
#pragma unroll 8
    for (int s = 0; s < count; s++) total += __ldcs(dots_slabs + ((i64)s * M + token) * DOTS + dot);
  }
  dcoef[k] = total;
}
