// The last backward step of a site and, CHAINED, the first one of the site before it, in one read of the streams.
//
//   dx[t,i,c]   = sum_o h_res[t,o,i] g[t,o,c] + h_pre[t,i] du[t,c] + rc[t] x[t,i,c] + sum_j dz[t,j] phi[j,i,c]
//   dphi[j,i,c] = sum_t dz[t,j] x[t,i,c]
// mix[t,i,:] holds h_res[t,:,i], h_pre[t,i], rc[t]; dz is given as two bf16 terms.
// CHAINED: x is what the site before wrote, so dx is the gradient of its write. With that site's input streams y, sublayer
// output f and projections proj (which give h_post, Eq. 16 and 18):
//   df[t,c] = sum_o h_post[t,o] dx[t,o,c]     dots[t,o] = <dx[t,o], f[t]>     dots[t,n+o*n+i] = <dx[t,o], y[t,i]>
//
// A block owns BLOCK_C channels of all streams and walks tiles of TOKENS tokens: rows of 512 bytes travel through
// STAGES tiles of padded shared memory. In a warp lane%4 is a pair of tokens and lane/4 a group of channels, so that the
// registers holding x are, after one byte permutation, the tensor core's operand of dphi, and its result of dz phi lands
// where x, g and du of the same token and channel already are. dphi accumulates in registers over all tiles of the block
// and is written once, to the block's own slab; slabs are summed in a fixed order afterwards (no atomics).
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
constexpr int P = MIX_COLUMNS, NP = DZ_COLUMNS;        // padded widths of mix and dz
// a token's numbers in shared memory, in words: mix | dz high | dz low | proj of post
constexpr int AT_DZ = n * P, AT_POST = AT_DZ + NP, NUMBERS = AT_POST + (CHAIN ? n : 0);
constexpr int NUMBERS_PITCH = (NUMBERS + 11) / 16 * 16 + 4;  // 4 mod 16: neighbouring tokens fall in different banks
constexpr int STAGE = SEGMENTS * SEGMENT + TOKENS * NUMBERS_PITCH * 4;
constexpr int PHI_WORDS = WARPS * n * MT * JT * 32;    // of uint2, for one of phi's two terms
constexpr int PHI_BYTES = 2 * PHI_WORDS * 8;
static_assert(SHARED_BYTES == PHI_BYTES + STAGES * STAGE + (CHAIN ? WARPS * TOKENS * DOTS * 4 : 0),
              "the launcher asks for the layout's bytes");
static_assert(SHARED_BYTES <= 232448, "tiles and phi must fit in a multiprocessor's shared memory");

struct Inputs {
  const u16 *x, *g, *du, *dz, *y, *f;
  const float *mix, *proj;
};

// phi[N, n, C] fp32 -> the tensor core's operand order, both terms, each warp its own channels: word r of
// (warp, i, mt, jt, lane) holds phi[8 jt + 2q, + 1] at stream i and channel 2 MT p + 2 mt + r of the warp
DEVICE void load_phi(const float* phi, uint2* terms, int channel0) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3, p = lane >> 2;
  const int channel = channel0 + warp * WARP_C + p * 2 * MT;
#pragma unroll
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int jt = 0; jt < JT; jt++) {
      float v[2][2 * MT];
#pragma unroll
      for (int h = 0; h < 2; h++) load_floats<2 * MT>(v[h], phi, 8 * jt + 2 * q + h, i, channel);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        uint2 hi, lo;
        split(v[0][2 * mt], v[1][2 * mt], hi.x, lo.x);
        split(v[0][2 * mt + 1], v[1][2 * mt + 1], hi.y, lo.y);
        const int at = (((warp * n + i) * MT + mt) * JT + jt) * 32 + lane;
        terms[at] = hi, terms[PHI_WORDS + at] = lo;
      }
    }
}

// What a tile needs until its end: x, and y and f; and the numbers of its tokens
DEVICE void load_late(unsigned char* stage, const Inputs& in, i64 token0, int M, int channel0) {
  constexpr int PIECES = BLOCK_C / VEC;
#pragma unroll
  for (int at = threadIdx.x; at < TOKENS * PIECES; at += THREADS) {
    const int row = at / PIECES, channel = channel0 + at % PIECES * VEC;
    const i64 token = token0 + row, streams = token * K + channel;
    const bool valid = token < M && channel < C;
    unsigned char* to = stage + row * PITCH + at % PIECES * VEC * 2;
#pragma unroll
    for (int i = 0; i < n; i++) {
      copy_async<2 * VEC>(to + i * SEGMENT, in.x + streams + i * C, valid);
      if (CHAIN) copy_async<2 * VEC>(to + (AT_Y + i) * SEGMENT, in.y + streams + i * C, valid);
    }
    if (CHAIN) copy_async<2 * VEC>(to + AT_F * SEGMENT, in.f + token * C + channel, valid);
  }
  u32* numbers = (u32*)(stage + SEGMENTS * SEGMENT);
  constexpr int MIX_PIECES = n * P / 4, NUMBER_PIECES = MIX_PIECES + NP / 4;
  for (int at = threadIdx.x; at < TOKENS * NUMBER_PIECES; at += THREADS) {
    const int row = at / NUMBER_PIECES, piece = at % NUMBER_PIECES;
    const i64 token = token0 + row;
    const void* from = piece < MIX_PIECES ? (const void*)(in.mix + token * (n * P) + piece * 4)
                                          : (const void*)(in.dz + token * (2 * NP) + (piece - MIX_PIECES) * 8);
    copy_async<16>(numbers + row * NUMBERS_PITCH + piece * 4, from, token < M);
  }
  if (CHAIN && threadIdx.x < TOKENS * n) {
    const int row = threadIdx.x / n, o = threadIdx.x % n;
    copy_async<4>(numbers + row * NUMBERS_PITCH + AT_POST + o, in.proj + (token0 + row) * N + n + o, token0 + row < M);
  }
}

// What a tile moves to registers at once, so that the place is free again: g and du
DEVICE void load_early(unsigned char* stage, const Inputs& in, i64 token0, int M, int channel0) {
  constexpr int PIECES = BLOCK_C / VEC;
#pragma unroll
  for (int at = threadIdx.x; at < TOKENS * PIECES; at += THREADS) {
    const int row = at / PIECES, channel = channel0 + at % PIECES * VEC;
    const i64 token = token0 + row;
    const bool valid = token < M && channel < C;
    unsigned char* to = stage + row * PITCH + at % PIECES * VEC * 2;
#pragma unroll
    for (int o = 0; o < n; o++)
      copy_async<2 * VEC>(to + (AT_G + o) * SEGMENT, in.g + token * K + o * C + channel, valid);
    copy_async<2 * VEC>(to + AT_DU * SEGMENT, in.du + token * C + channel, valid);
  }
}

DEVICE void store_streams(const unsigned char* stage, u16* dx, u16* df, i64 token0, int M, int channel0) {
  constexpr int PIECES = BLOCK_C / VEC;
#pragma unroll
  for (int at = threadIdx.x; at < TOKENS * PIECES; at += THREADS) {
    int row = at / PIECES, channel = channel0 + at % PIECES * VEC;
    i64 token = token0 + row;
    if (token < M && channel < C) {
      const unsigned char* from = stage + row * PITCH + at % PIECES * VEC * 2;
#pragma unroll
      for (int i = 0; i < n; i++) store_row(dx + token * K + i * C + channel, from + i * SEGMENT);
      if (CHAIN) store_row(df + token * C + channel, from + AT_F * SEGMENT);
    }
  }
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

// Eq. 16 and 18 for the tile's tokens, in place of the projections
DEVICE void make_h_post(float* numbers, float alpha, const float* bias, float multiplier) {
  if (threadIdx.x < TOKENS * n) {
    const int row = threadIdx.x / n, o = threadIdx.x % n;
    float* at = numbers + row * NUMBERS_PITCH + AT_POST + o;
    *at = multiplier / (1.f + __expf(-fmaf(alpha, *at, __ldg(bias + n + o))));
  }
}

// df of the site before, from dx (bf16, as stored) of the lane's two tokens and channels
DEVICE void write_df(unsigned char* mine, const float* numbers, const u32 (*dx)[2][MT], int q) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float* h_post = numbers + (2 * q + e) * NUMBERS_PITCH + AT_POST;
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

// The inner products of a warp's channels. For four tokens at once the left operand's rows are (token, o), read from dx
// in shared memory; the right operand's columns are one token's y[0..n-1] and f, so that token's four rows hold its dots.
DEVICE void write_dots(const unsigned char* stage, float* partial, int warp, int lane) {
  const int q = lane & 3, p = lane >> 2, matrix = lane >> 3, row = lane & 7;
#pragma unroll
  for (int group = 0; group < TOKENS / 4; group++) {
    // matrices: rows 0-7 | 8-15, first 8 channels | next 8
    const int a_row = row + (matrix & 1) * 8, o = min(a_row & 3, n - 1), i = min(row, n);
    const unsigned char* a_from =
        stage + o * SEGMENT + (4 * group + (a_row >> 2)) * PITCH + warp * WARP_C * 2 + (matrix >> 1) * 16;
    u32 a[WARP_C / 16][4];
#pragma unroll
    for (int step = 0; step < WARP_C / 16; step++) load_matrices(a[step], a_from + step * 32);
#pragma unroll
    for (int token = 0; token < 4; token++) {
      u32 b[4];  // both k-steps of this token: 8 channels a matrix
      load_matrices(b, stage + (AT_Y + i) * SEGMENT + (4 * group + token) * PITCH + warp * WARP_C * 2 + matrix * 16);
      float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int step = 0; step < WARP_C / 16; step++)
        mma16(d, a[step][0], a[step][1], a[step][2], a[step][3], b[2 * step], b[2 * step + 1]);
      // rows 4 token .. 4 token + 3: lanes with p / 4 == token % 2, in the upper or lower half of d
      const int out = p & 3;
      if ((p >> 2) == (token & 1) && out < n) {
        float* to = partial + (4 * group + token) * DOTS + out * (n + 1) + 2 * q;
        if (2 * q <= n) to[0] = d[token & 2];
        if (2 * q + 1 <= n) to[1] = d[(token & 2) + 1];
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
streams_backward_kernel(const u16* x, const u16* g, const u16* du, const float* mix, const u16* dz, const float* phi,
                        const u16* y, const u16* f, const float* proj, const float* alpha_post, const float* bias,
                        float post_multiplier, u16* dx, float* dphi_slabs, u16* df, float* dots_slabs, int M) {
  extern __shared__ __align__(128) unsigned char shared[];
  uint2* terms = (uint2*)shared;
  unsigned char* stages = shared + PHI_BYTES;
  float* partials = (float*)(stages + STAGES * STAGE);
  const Inputs in = {x, g, du, dz, y, f, mix, proj};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3, p = lane >> 2;
  const int channel0 = blockIdx.x * BLOCK_C;
  const i64 tiles = ((i64)M + TOKENS - 1) / TOKENS;
  const i64 tile0 = tiles * blockIdx.y / gridDim.y;
  const int count = (int)(tiles * (blockIdx.y + 1) / gridDim.y - tile0);

  auto early = [&](int it) {
    if (it < count) load_early(stages + it % STAGES * STAGE, in, (tile0 + it) * TOKENS, M, channel0);
    copies_commit();
  };
  auto late = [&](int it) {
    if (it < count) load_late(stages + it % STAGES * STAGE, in, (tile0 + it) * TOKENS, M, channel0);
    copies_commit();
  };
  early(0);
#pragma unroll
  for (int it = 0; it < STAGES - 1; it++) late(it), early(it + 1);
  load_phi(phi, terms, channel0);
  const float alpha = CHAIN ? __ldg(alpha_post) : 0.f;
  float dphi[n][MT][JT][4];
#pragma unroll
  for (int k = 0; k < n * MT * JT * 4; k++) (&dphi[0][0][0][0])[k] = 0.f;
  const uint2* phi_hi = terms + warp * (n * MT * JT * 32) + lane;
  const uint2* phi_lo = phi_hi + PHI_WORDS;

  for (int it = 0; it < count; it++) {
    unsigned char* stage = stages + it % STAGES * STAGE;
    copies_wait<2 * STAGES - 3>();  // this tile has arrived
    __syncthreads();
    late(it + STAGES - 1);
    unsigned char* mine = stage + 2 * q * PITCH + warp * WARP_C * 2 + p * 4 * MT;  // token 2q; the next row is 2q + 1
    float* numbers = (float*)(stage + SEGMENTS * SEGMENT);
    u32 gw[n][2][MT], uw[2][MT], out[n][2][MT];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      read_words(uw[e], mine + AT_DU * SEGMENT + e * PITCH);
#pragma unroll
      for (int o = 0; o < n; o++) read_words(gw[o][e], mine + (AT_G + o) * SEGMENT + e * PITCH);
    }
    if (CHAIN) make_h_post(numbers, alpha, bias, post_multiplier);
    __syncthreads();
    early(it + STAGES);
    // dz as the right operand of phi dz (token p, coefficients 2q) and of x^T dz (tokens 2q, coefficient p)
    u32 z_hi[JT], z_lo[JT], t_hi[JT], t_lo[JT];
    const u32* z = (const u32*)numbers + p * NUMBERS_PITCH + AT_DZ + q;
    const u16* t = (const u16*)((const u32*)numbers + 2 * q * NUMBERS_PITCH + AT_DZ) + p;
#pragma unroll
    for (int jt = 0; jt < JT; jt++) {
      z_hi[jt] = z[4 * jt], z_lo[jt] = z[NP / 2 + 4 * jt];
      t_hi[jt] = t[8 * jt] | (u32)t[8 * jt + 2 * NUMBERS_PITCH] << 16;
      t_lo[jt] = t[8 * jt + NP] | (u32)t[8 * jt + NP + 2 * NUMBERS_PITCH] << 16;
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
        const uint2* hi = phi_hi + (i * MT + mt) * JT * 32;
        const uint2* lo = phi_lo + (i * MT + mt) * JT * 32;
        sum[mt][0] = sum[mt][1] = sum[mt][2] = sum[mt][3] = 0.f;
#pragma unroll
        for (int jt = 0; jt + 1 < JT; jt += 2) {
          const uint2 a = hi[jt * 32], b = hi[(jt + 1) * 32], c = lo[jt * 32], d = lo[(jt + 1) * 32];
          mma16(sum[mt], a.x, a.y, b.x, b.y, z_hi[jt], z_hi[jt + 1]);
          mma16(sum[mt], a.x, a.y, b.x, b.y, z_lo[jt], z_lo[jt + 1]);
          mma16(sum[mt], c.x, c.y, d.x, d.y, z_hi[jt], z_hi[jt + 1]);
        }
        if (JT % 2) {
          const uint2 a = hi[(JT - 1) * 32], c = lo[(JT - 1) * 32];
          mma16(sum[mt], a.x, a.y, a.x, a.y, z_hi[JT - 1], z_lo[JT - 1]);
          mma8(sum[mt], c.x, c.y, z_hi[JT - 1]);
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
        for (int jt = 0; jt < JT; jt++) mma16(dphi[i][mt][jt], a0, a1, a0, a1, t_hi[jt], t_lo[jt]);
      }
    }
    if (CHAIN) {
      __syncwarp();
      write_dots(stage, partials + warp * TOKENS * DOTS, warp, lane);
      __syncwarp();
      write_df(mine, numbers, out, q);
    }
    __syncthreads();
    const i64 token0 = (tile0 + it) * TOKENS;
    store_streams(stage, dx, df, token0, M, channel0);
    if (CHAIN) {
      for (int at = threadIdx.x; at < TOKENS * DOTS; at += THREADS) {
        const int row = at / DOTS, k = at % DOTS;
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += partials[(w * TOKENS + row) * DOTS + k];
        if (token0 + row < M) dots_slabs[((i64)blockIdx.x * M + token0 + row) * DOTS + k] = total;
      }
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
#pragma unroll 4
    for (int s = 0; s < count; s++) total += __ldcs(dots_slabs + ((i64)s * M + token) * DOTS + dot);
  }
  dcoef[k] = total;
}
