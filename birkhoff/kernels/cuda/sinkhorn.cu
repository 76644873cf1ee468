// Batched Sinkhorn, forward and exact backward, after tile.cuh. BACKWARD chooses the kernel.
//
// Columns first, K = exp(X - column max), b_0 = 1:   a_t = 1 / (K^T b_{t-1}),  b_t = 1 / (K a_t),  P = diag(b_T) K diag(a_T).

#if !BACKWARD

// The same iteration on log2 of the matrix itself, for matrices that linear arithmetic cannot hold; overwrites their result.
SLOW void forward_on_logarithms(const element* logits, element* target, i64 matrix, i64 batch, int num_iters, real range_cap,
                                bool wide) {
  Place at = place();
  Block e;
  Rows b, no_rows;
  Columns a, no_columns;
  read_block(logits, matrix, batch, at, e);
  exponents(e, range_cap, at);
  fill(no_rows, 0);
  fill(no_columns, 0);
#pragma unroll 1
  for (int t = 0; t < num_iters; t++) {
    log_column_sums(e, no_rows, a);
    shift_columns(e, a);
    log_row_sums(e, no_columns, b);
    shift_rows(e, b);
  }
#pragma unroll
  for (int k = 0; k < BR * BC; k++) e[k] = exp_2(e[k]);
  divide_rows(e);
  if (wide) write_block(target, matrix, batch, at, e);
}

// Column scalings of the last iteration (damped: both scalings).
template <int IN_COLUMNS, int IN_ROWS, int AT_A_TIME>
INLINE void scalings(const Block &m, Columns &a, Rows &b, int num_iters, real eps, Place at) {
  begin(m, a, b, eps, at);
#pragma unroll AT_A_TIME
  for (int t = 1; t < num_iters; t++) {
    column_step<IN_COLUMNS>(m, b, a, eps, at);
    row_step<IN_ROWS>(m, a, b, eps, at);
  }
  if (!DAMPED) column_step<IN_COLUMNS>(m, b, a, eps, at);
}

// Exponents to the result, for every matrix whose exponents are at least LINEAR_TO.
INLINE void iterate(Block &m, real low, int num_iters, real eps_start, real eps_den, Place at) {
  Columns a;
  Rows b;
  start(m, eps_start, at);
  bool narrow_range = low >= PAIRED_TO;
  if (DAMPED || __any_sync(~0u, narrow_range)) {
    if (UNROLL > 1 && num_iters == USUAL) scalings<PAIRS_A, PAIRS_B, USUAL>(m, a, b, USUAL, eps_den, at);
    else scalings<PAIRS_A, PAIRS_B, UNROLL>(m, a, b, num_iters, eps_den, at);
  }
  if (!DAMPED && PAIRS_A + PAIRS_B > 0 && __any_sync(~0u, !narrow_range && low >= LINEAR_TO)) {
    Columns a1;
    Rows b1;
    scalings<0, 0, UNROLL>(m, a1, b1, num_iters, eps_den, at);
#pragma unroll
    for (int k = 0; k < BC; k++) a[k] = narrow_range ? a[k] : a1[k];
  }
  scale_columns(m, a);
  if (DAMPED) scale_rows(m, b); else divide_rows(m);  // dividing the matrix itself makes its sums exact
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
sinkhorn_forward(const element* __restrict__ logits, element* __restrict__ matrix, i64 batch, int num_iters, real eps_start,
                 real eps_den, real range_cap) {
  extern __shared__ __align__(16) unsigned char memory[];
  int warp = threadIdx.x >> 5;
  i64 first = ((i64)blockIdx.x * (THREADS / 32) + warp) * PER_WARP, mine = first + (threadIdx.x & 31) / LANES;
  if (first >= batch) return;
  unsigned char* tile = memory + warp * TILE_BYTES;
  Place at = place();
  Block m;
  if (LANES == 1) {
    fetch_tile(tile, logits, first, batch);
    wait_tile();
    read_tile(tile, m);
    __syncwarp();
  } else {
    read_block(logits, mine, batch, at, m);
  }
  exponents(m, range_cap, at);
  real low = lowest(m, at);
  bool wide = !DAMPED && !(low >= LINEAR_TO);
  iterate(m, low, num_iters, eps_start, eps_den, at);
  if (LANES == 1) write_tile(tile, m, matrix, first, batch); else write_block(matrix, mine, batch, at, m);
  __syncwarp();
  if (!DAMPED && __any_sync(~0u, wide)) forward_on_logarithms(logits, matrix, mine, batch, num_iters, range_cap, wide);
}

#else

// The scalings of `kept` iterations at a time lie in shared memory, but for the last HELD, which stay in registers; earlier
// iterations are replayed.

constexpr int ALL_ROWS = BR * GR, ALL_COLUMNS = BC * GC;
constexpr int VECTOR = BR % 4 || BC % 4 || sizeof(real) != 4 ? 1 : 4;
// One matrix a lane: lane by lane in groups of VECTOR. Several lanes: matrix by matrix, apart by an odd number of vectors.
constexpr int MATRIX_PITCH = LANES == 1 ? VECTOR : ALL_ROWS + ALL_COLUMNS + VECTOR, GROUP_PITCH = LANES == 1 ? 32 * VECTOR : VECTOR;
constexpr int STEP_PITCH = LANES == 1 ? 32 * (BR + BC) : PER_WARP * MATRIX_PITCH;

struct History {
  real* memory;
  INLINE History(real* shared, Place at) {
    memory = shared + (threadIdx.x & 31) / LANES * MATRIX_PITCH;
    columns = at.block_column * BC / VECTOR * GROUP_PITCH;
    rows = (ALL_COLUMNS + at.block_row * BR) / VECTOR * GROUP_PITCH;
    writes_columns = at.block_row == 0;
    writes_rows = at.block_column == 0;
  }
  template <int COUNT> static INLINE void put(real* to, const real (&v)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; k += VECTOR, to += GROUP_PITCH) {
      if (VECTOR == 4) *(float4*)to = make_float4(v[k], v[k + VECTOR / 4], v[k + VECTOR / 2], v[k + VECTOR - 1]);
      else *to = v[k];
    }
  }
  template <int COUNT> static INLINE void get(const real* from, real (&v)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; k += VECTOR, from += GROUP_PITCH) {
      if (VECTOR == 4) {
        float4 x = *(const float4*)from;
        v[k] = x.x; v[k + VECTOR / 4] = x.y; v[k + VECTOR / 2] = x.z; v[k + VECTOR - 1] = x.w;
      } else {
        v[k] = *from;
      }
    }
  }
  INLINE void keep(int t, const Columns &a, const Rows &b) const {
    if (GR == 1 || writes_columns) put(memory + t * STEP_PITCH + columns, a);
    if (GC == 1 || writes_rows) put(memory + t * STEP_PITCH + rows, b);
  }
  INLINE void recall(int t, Columns &a, Rows &b) const {
    get(memory + t * STEP_PITCH + columns, a);
    get(memory + t * STEP_PITCH + rows, b);
  }

 private:
  int columns, rows;
  bool writes_columns, writes_rows;
};

INLINE void add_outer(Block &dm, const Rows &x, const Columns &y) {
#pragma unroll
  for (int k = 0; k < BR * BC; k++) dm[k] = fused(x[k / BC], y[k % BC], dm[k]);
}
// -v^2 d, in the order that stays in range: v d has the size of the gradient.
template <int COUNT> INLINE void pull_reciprocal(real (&out)[COUNT], const real (&v)[COUNT], const real (&d)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; k++) out[k] = -v[k] * (v[k] * d[k]);
}

// Gradients of K, a and b of P = diag(b) K diag(a); dm comes as the gradient of P and leaves as that of K.
INLINE void pull_result(const Block &m, const Columns &a, const Rows &b, Block &dm, Columns &da, Rows &db) {
  fill(da, 0);
  fill(db, 0);
#pragma unroll
  for (int k = 0; k < BR * BC; k++) {
    real flow = dm[k] * m[k];
    da[k % BC] = fused(flow, b[k / BC], da[k % BC]);
    db[k / BC] = fused(flow, a[k % BC], db[k / BC]);
    dm[k] *= a[k % BC] * b[k / BC];
  }
#pragma unroll
  for (int k = 0; k < BC; k++) da[k] = sum_over_rows(da[k]);
#pragma unroll
  for (int k = 0; k < BR; k++) db[k] = sum_over_columns(db[k]);
}
// b = 1 / (K a):  q = -b^2 db,  dK += q a^T,  da = K^T q
INLINE void pull_row_step(const Block &m, const Columns &a, const Rows &b, Block &dm, Columns &da, const Rows &db) {
  Rows q;
  pull_reciprocal(q, b, db);
  column_sums(m, q, da);
  add_outer(dm, q, a);
}
// a = 1 / (K^T b):  s = -a^2 da,  dK += b s^T,  db = K s
INLINE void pull_column_step(const Block &m, const Columns &a, const Rows &b, Block &dm, const Columns &da, Rows &db) {
  Columns s;
  pull_reciprocal(s, a, da);
  row_sums(m, s, db);
  add_outer(dm, b, s);
}
// v / (v sum + eps), the sum fixed: eps (after / v)^2 d
template <int COUNT>
INLINE void pull_damping(real (&d)[COUNT], const real (&after)[COUNT], const real (&v)[COUNT], real eps) {
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    real ratio = after[k] * approximate_reciprocal(v[k]);
    d[k] *= eps * ratio * ratio;
  }
}

// A raised logit hands its gradient to the largest of its column; equal largest share it.
INLINE void pull_cap(const element* logits, i64 matrix, i64 batch, real range_cap, Place at, Block &d) {
  Block x;
  read_block(logits, matrix, batch, at, x);
#pragma unroll
  for (int j = 0; j < BC; j++) {
    real peak = minus_infinity(), taken = 0, ties = 0;
#pragma unroll
    for (int i = 0; i < BR; i++) if (at.has_row(i)) peak = larger(peak, x[i * BC + j]);
    peak = max_over_rows(peak);
#pragma unroll
    for (int i = 0; i < BR; i++) {
      if (!at.has_row(i)) continue;
      if (x[i * BC + j] < peak - range_cap) { taken += d[i * BC + j]; d[i * BC + j] = 0; }
      if (x[i * BC + j] == peak) ties += 1;
    }
    taken = sum_over_rows(taken);
    ties = sum_over_rows(ties);
#pragma unroll
    for (int i = 0; i < BR; i++) if (x[i * BC + j] == peak) d[i * BC + j] += taken / ties;
  }
}

// The gradient on logarithms, for matrices that linear arithmetic cannot hold; the history holds the potentials.
// Overwrites their gradient.
SLOW void backward_on_logarithms(const element* logits, const element* grad, element* target, i64 matrix, i64 batch,
                                 int num_iters, int kept, real range_cap, real* shared, bool wide) {
  Place at = place();
  History history(shared, at);
  Block e, d;
  Columns a, da;
  Rows b, db;
  read_block(logits, matrix, batch, at, e);
  exponents(e, range_cap, at);
#pragma unroll 1
  for (int end = num_iters; end > 0; end -= kept) {
    int from = end > kept ? end - kept : 0;
    fill(a, 0);
    fill(b, 0);
    __syncwarp();
#pragma unroll 1
    for (int t = 0; t < end; t++) {
      if (t >= from) history.keep(t - from, a, b);
      log_column_sums(e, b, a);
      log_row_sums(e, a, b);
    }
    __syncwarp();
    if (end == num_iters) {
      read_block(grad, matrix, batch, at, d);
      fill(da, 0);
      fill(db, 0);
#pragma unroll
      for (int k = 0; k < BR * BC; k++) {
        d[k] *= exp_2(e[k] + a[k % BC] + b[k / BC]);
        da[k % BC] += d[k];
        db[k / BC] += d[k];
      }
#pragma unroll
      for (int k = 0; k < BC; k++) da[k] = sum_over_rows(da[k]);
#pragma unroll
      for (int k = 0; k < BR; k++) db[k] = sum_over_columns(db[k]);
    }
#pragma unroll 1
    for (int t = end - 1; t >= from; t--) {  // each normalisation: d -= P diag(sums of d), P the matrix it made
      Columns a0, flow_a;
      Rows b0, flow_b;
      history.recall(t - from, a0, b0);
      fill(flow_a, 0);
      fill(flow_b, 0);
#pragma unroll
      for (int k = 0; k < BR * BC; k++) {
        real x = exp_2(e[k] + a[k % BC] + b[k / BC]) * db[k / BC];
        d[k] -= x;
        flow_a[k % BC] += x;
      }
#pragma unroll
      for (int k = 0; k < BC; k++) da[k] -= sum_over_rows(flow_a[k]);
#pragma unroll
      for (int k = 0; k < BR * BC; k++) {
        real x = exp_2(e[k] + a[k % BC] + b0[k / BC]) * da[k % BC];
        d[k] -= x;
        flow_b[k / BC] += x;
      }
#pragma unroll
      for (int k = 0; k < BR; k++) { db[k] = -sum_over_columns(flow_b[k]); b[k] = b0[k]; }
#pragma unroll
      for (int k = 0; k < BC; k++) { da[k] = 0; a[k] = a0[k]; }
    }
  }
  if (CAPPED) pull_cap(logits, matrix, batch, range_cap, at, d);
  if (wide) write_block(target, matrix, batch, at, d);
}

// m comes as the exponents and leaves as the gradient of the logits; dm comes as the gradient of the result (one lane).
INLINE void pull(Block &m, Block &dm, const element* logits, const element* grad, i64 matrix, i64 batch, int num_iters,
                 int kept, real eps_start, real eps_den, real range_cap, real* shared, Place at) {
  History history(shared, at);
  Columns a, da;
  Rows b, db;
  int full = DAMPED ? num_iters - 1 : num_iters;
  start(m, eps_start, at);
  begin(m, a, b, eps_den, at);
  if (DAMPED && full == 0) {
    if (LANES > 1) read_block(grad, matrix, batch, at, dm);
    pull_result(m, a, b, dm, da, db);
  }
  for (int end = full; end > 0; end -= kept) {
    int from = end > kept ? end - kept : 0;
    Columns a0;
    Rows b0;
    if (end != full) {
      begin(m, a, b, eps_den, at);
      __syncwarp();
    }
#pragma unroll 1
    for (int t = 0; t < from; t++) {
      column_step<0>(m, b, a, eps_den, at);
      row_step<0>(m, a, b, eps_den, at);
    }
    int stored = end - from, held = !DAMPED && stored > HELD ? HELD : 0;
    Columns held_a[HELD + 1];
    Rows held_b[HELD + 1];
#pragma unroll UNROLL
    for (int t = 0; t < stored - held; t++) {
      history.keep(t, a, b);
      column_step<0>(m, b, a, eps_den, at);
      row_step<0>(m, a, b, eps_den, at);
    }
    if (held) {
#pragma unroll
      for (int t = 0; t < HELD; t++) {
        copy(held_a[t], a);
        copy(held_b[t], b);
        column_step<0>(m, b, a, eps_den, at);
        row_step<0>(m, a, b, eps_den, at);
      }
    }
    __syncwarp();
    if (end == full) {
      if (LANES > 1) read_block(grad, matrix, batch, at, dm);
      pull_result(m, a, b, dm, da, db);
#if !DAMPED  // the last row step; the loop below then begins with a column step
      Columns more;
      pull_row_step(m, a, b, dm, more, db);
#pragma unroll
      for (int k = 0; k < BC; k++) da[k] += more[k];
#endif
    }
#if DAMPED
#pragma unroll 1
    for (int t = stored - 1; t >= 0; t--) {
      Columns more;
      Rows flow;
      history.recall(t, a0, b0);
      pull_row_step(m, a, b, dm, more, db);
#pragma unroll
      for (int k = 0; k < BC; k++) da[k] += more[k];
      pull_column_step(m, a, b0, dm, da, flow);
      pull_damping(db, b, b0, eps_den);
      pull_damping(da, a, a0, eps_den);
#pragma unroll
      for (int k = 0; k < BR; k++) { db[k] += flow[k]; b[k] = b0[k]; }
#pragma unroll
      for (int k = 0; k < BC; k++) a[k] = a0[k];
    }
#else
    if (held) {
#pragma unroll
      for (int t = HELD - 1; t >= 0; t--) {
        pull_column_step(m, a, held_b[t], dm, da, db);
        pull_row_step(m, held_a[t], held_b[t], dm, da, db);
        copy(a, held_a[t]);
      }
    }
    int last = from > 0 ? 0 : 1;  // b_0 = 1 is a constant: nothing flows below the first column step
#pragma unroll UNROLL
    for (int t = stored - held - 1; t >= last; t--) {
      history.recall(t, a0, b0);
      pull_column_step(m, a, b0, dm, da, db);
      pull_row_step(m, a0, b0, dm, da, db);
      copy(a, a0);
    }
    if (last) {
      fill(b0, 1);
      pull_column_step(m, a, b0, dm, da, db);
    }
#endif
  }
#if DAMPED  // the first division by rows, from scalings of one, then log(softmax + eps_start)
  Columns lost;
  Rows ones;
  fill(a, 1);
  fill(b, 1);
  fill(ones, 1);
  row_step<0>(m, a, b, eps_den, at);
  pull_row_step(m, a, b, dm, lost, db);
#pragma unroll
  for (int k = 0; k < BR * BC; k++) {
    m[k] = at.has(k / BC, k % BC) ? m[k] - eps_start : ZERO;
    dm[k] *= m[k];
  }
  column_sums(dm, ones, lost);
#pragma unroll
  for (int k = 0; k < BR * BC; k++) m[k] = fused(-m[k], lost[k % BC], dm[k]);
#else
#pragma unroll
  for (int k = 0; k < BR * BC; k++) m[k] *= dm[k];
#endif
  if (CAPPED) pull_cap(logits, matrix, batch, range_cap, at, m);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
sinkhorn_backward(const element* __restrict__ logits, const element* __restrict__ grad_matrix,
                  element* __restrict__ grad_logits, i64 batch, int num_iters, int kept, real eps_start, real eps_den,
                  real range_cap) {
  extern __shared__ __align__(16) unsigned char memory[];
  int warp = threadIdx.x >> 5, slots = !DAMPED && kept > HELD ? kept - HELD : kept;
  int history_bytes = slots * STEP_PITCH * (int)sizeof(real);
  i64 first = ((i64)blockIdx.x * (THREADS / 32) + warp) * PER_WARP, mine = first + (threadIdx.x & 31) / LANES;
  if (first >= batch) return;
  unsigned char* shared = memory + warp * (history_bytes > 2 * TILE_BYTES ? history_bytes : 2 * TILE_BYTES);
  Place at = place();
  Block m, g;
  if (LANES == 1) {
    fetch_tile(shared, logits, first, batch);
    fetch_tile(shared + TILE_BYTES, grad_matrix, first, batch);
    wait_tile();
    read_tile(shared, m);
    read_tile(shared + TILE_BYTES, g);
    __syncwarp();
  } else {
    read_block(logits, mine, batch, at, m);
  }
  exponents(m, range_cap, at);
  bool wide = !DAMPED && !(lowest(m, at) >= LINEAR_TO);
  pull(m, g, logits, grad_matrix, mine, batch, num_iters, kept, eps_start, eps_den, range_cap, (real*)shared, at);
  __syncwarp();
  if (LANES == 1) write_tile(shared, m, grad_logits, first, batch); else write_block(grad_logits, mine, batch, at, m);
  __syncwarp();
  if (!DAMPED && __any_sync(~0u, wide))
    backward_on_logarithms(logits, grad_matrix, grad_logits, mine, batch, num_iters, slots, range_cap, (real*)shared, wide);
}

#endif
