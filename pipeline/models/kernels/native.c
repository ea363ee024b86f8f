/* What a training step in bf16 computes beside its matrix products, each in one pass over memory. native.py compiles it.

   bf16 in and out, fp32 inside. A row, or a sequence's head group, is computed by one thread in a fixed order, so that
   the numbers depend neither on the number of threads nor on the run. Vectors are GCC's and Clang's own: the compiler
   makes of them what the CPU has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define W 16 /* numbers of a vector */
typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * W), aligned(2)));

static inline vec load(const bf16 *x) { return (vec)(__builtin_convertvector(*(const halves *)x, bits) << 16); }

/* to the nearest bf16, ties to even */
static inline void store(bf16 *x, vec value) {
  bits u = (bits)value;
  u += 0x7fff + ((u >> 16) & 1);
  *(halves *)x = __builtin_convertvector(u >> 16, halves);
}

static inline vec all(float x) { return x - (vec){0}; }
static inline vec choose(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

static inline float sum(vec x) {
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
}

static inline float largest(vec x) {
  float most = x[0];
  for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
  return most;
}

/* e^x for x from −87 to 88, within 2 units of the last place: 2^n · e^r with |r| ≤ ln 2 / 2, e^r by its Taylor polynomial. NaN
   stays NaN, so that a diverged run is seen. */
static inline vec exponential(vec x) {
  vec least = all(-87), most = all(88);
  x = choose(x < least, least, choose(x > most, most, x));
  vec magic = all(12582912); /* 1.5 · 2^23: adding it rounds to an integer */
  vec shifted = x * 1.44269504f + magic, n = shifted - magic;
  vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * (1.f / 720) + (1.f / 120);
  p = p * r + (1.f / 24);
  p = p * r + (1.f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return (vec)((ints)p + (((ints)shifted - (ints)magic) << 23));
}

/* ---- RMSNorm. `added` may be 0, or another term of x: then `total` is their sum, rounded, and what is normalized. */

void rms_norm_forward(const bf16 *x, const bf16 *added, const bf16 *weight, bf16 *total, bf16 *out, float *inverse,
                      long rows, long width, float eps, float offset) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < rows; row++) {
    const bf16 *from = x + row * width;
    if (added) {
      for (long i = 0; i < width; i += W) store(total + row * width + i, load(from + i) + load(added + row * width + i));
      from = total + row * width;
    }
    vec squares = {0};
    for (long i = 0; i < width; i += W) squares += load(from + i) * load(from + i);
    float r = 1 / sqrtf(sum(squares) / width + eps);
    inverse[row] = r;
    for (long i = 0; i < width; i += W) store(out + row * width + i, load(from + i) * r * (load(weight + i) + offset));
  }
}

/* With n = x·r and g = dy∘(offset + w): dx = r·(g − n·mean(g∘n)), plus `passed`, what else reaches x, unless 0. */
void rms_norm_backward(const bf16 *grad, const bf16 *passed, const bf16 *x, const bf16 *weight, const float *inverse,
                       bf16 *d_x, long rows, long width, float offset) {
#pragma omp parallel for schedule(static)
  for (long row = 0; row < rows; row++) {
    const bf16 *g = grad + row * width, *from = x + row * width;
    vec products = {0};
    for (long i = 0; i < width; i += W) products += load(g + i) * (load(weight + i) + offset) * load(from + i);
    float r = inverse[row], mean = sum(products) * r * r / width;
    for (long i = 0; i < width; i += W) {
      vec d = (load(g + i) * (load(weight + i) + offset) - load(from + i) * mean) * r;
      if (passed) d += load(passed + row * width + i);
      store(d_x + row * width + i, d);
    }
  }
}

/* ---- SwiGLU: out = gate·σ(gate)·up */

void swiglu_forward(const bf16 *gate, const bf16 *up, bf16 *out, long count) {
#pragma omp parallel for schedule(static)
  for (long at = 0; at < count; at += W) {
    vec g = load(gate + at);
    store(out + at, g / (1 + exponential(-g)) * load(up + at));
  }
}

void swiglu_backward(const bf16 *grad, const bf16 *gate, const bf16 *up, bf16 *d_gate, bf16 *d_up, long count) {
#pragma omp parallel for schedule(static)
  for (long at = 0; at < count; at += W) {
    vec g = load(gate + at), u = load(up + at), d = load(grad + at);
    vec sigma = 1 / (1 + exponential(-g));
    store(d_gate + at, d * u * sigma * (1 + g * (1 - sigma)));
    store(d_up + at, d * g * sigma);
  }
}

/* ---- Rotary positions: pairs (i, i + K/2) of each head turn by the angles of cos and sin (tokens, K), `sign` 1 or −1 */

void rotate(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *out, long tokens, long heads, long K, float sign) {
  long half = K / 2;
#pragma omp parallel for schedule(static)
  for (long token = 0; token < tokens; token++) {
    const bf16 *c = cos + token * K, *s = sin + token * K;
    for (long head = 0; head < heads; head++) {
      long at = (token * heads + head) * K;
      for (long i = 0; i < half; i += W) {
        vec a = load(x + at + i), b = load(x + at + half + i);
        vec first = sign > 0 ? load(s + i) : -load(s + half + i), second = sign > 0 ? load(s + half + i) : -load(s + i);
        store(out + at + i, a * load(c + i) - b * first);
        store(out + at + half + i, b * load(c + half + i) + a * second);
      }
    }
  }
}

/* ---- Cross-entropy of rows of logits (rows, V) with a label each, and its gradient softmax − onehot, unless 0 */

void cross_entropy(const bf16 *logits, const int64_t *labels, float *losses, bf16 *grad, long rows, long V) {
  long whole = V / W * W;
#pragma omp parallel for schedule(static)
  for (long row = 0; row < rows; row++) {
    const bf16 *z = logits + row * V;
    bf16 tail[W], *out = grad + row * V;
    for (int i = 0; i < W; i++) tail[i] = 0xff80; /* −∞ */
    memcpy(tail, z + whole, (V - whole) * sizeof(bf16));
    vec most = load(tail), total = {0};
    for (long i = 0; i < whole; i += W) most = larger(load(z + i), most);
    float top = largest(most);
    for (long i = 0; i < whole; i += W) total += exponential(load(z + i) - top);
    vec last = exponential(load(tail) - top);
    for (long i = 0; i < V - whole; i++) total[i] += last[i];
    float mass = sum(total), label;
    uint32_t own = (uint32_t)z[labels[row]] << 16;
    memcpy(&label, &own, sizeof label);
    losses[row] = top + logf(mass) - label;
    if (!grad) continue;
    for (long i = 0; i < whole; i += W) store(out + i, exponential(load(z + i) - top) * (1 / mass));
    store(tail, last * (1 / mass));
    memcpy(out + whole, tail, (V - whole) * sizeof(bf16));
    store(tail, all(expf(label - top) / mass - 1)); /* p − 1 in fp32: of a rounded p it would lose its digits */
    out[labels[row]] = tail[0];
  }
}

/* ---- Causal attention of packed sequences. Token n of q is at q + n·q_token, its head h at + h·q_head; likewise keys
   and values. A thread has one head group of one sequence, as floats: its keys (T, K) and values, and both transposed. */

#define M 8        /* rows of a tile */
#define N (2 * W)  /* its columns */
#define BLOCK 32   /* queries whose scores are in memory at once */
#define UP(x, to) (((x) + (to) - 1) / (to) * (to))

/* c (M, N) = a (M, depth) · b (depth, N), or added to it; element (m, d) of a is at m·a_m + d·a_d */
static inline __attribute__((always_inline)) void tile(const float *a, long a_m, long a_d, const float *b, long b_d,
                                                       float *c, long c_m, long depth, int add) {
  vec left[M], right[M];
  for (int m = 0; m < M; m++) {
    left[m] = add ? *(vec *)(c + m * c_m) : (vec){0};
    right[m] = add ? *(vec *)(c + m * c_m + W) : (vec){0};
  }
  for (long d = 0; d < depth; d++) {
    vec b0 = *(const vec *)(b + d * b_d), b1 = *(const vec *)(b + d * b_d + W);
    for (int m = 0; m < M; m++) {
      float x = a[m * a_m + d * a_d];
      left[m] += x * b0;
      right[m] += x * b1;
    }
  }
  for (int m = 0; m < M; m++) {
    *(vec *)(c + m * c_m) = left[m];
    *(vec *)(c + m * c_m + W) = right[m];
  }
}

/* c (rows, columns) = a (rows, depth) · b (depth, columns), multiples of M and N */
static inline __attribute__((always_inline)) void product(const float *a, long a_m, long a_d, const float *b, long b_d,
                                                          float *c, long c_m, long rows, long columns, long depth,
                                                          int add) {
  for (long n = 0; n < columns; n += N)
    for (long m = 0; m < rows; m += M) tile(a + m * a_m, a_m, a_d, b + n, b_d, c + m * c_m + n, c_m, depth, add);
}

/* rows of bf16 as floats times `scale`; those from `count` to `padded` are 0 */
static void widen(const bf16 *x, long step, float *out, long count, long padded, long K, float scale) {
  for (long t = 0; t < count; t++)
    for (long i = 0; i < K; i += W) *(vec *)(out + t * K + i) = load(x + t * step + i) * scale;
  memset(out + count * K, 0, (padded - count) * K * sizeof(float));
}

static void transpose(const float *x, float *out, long T, long K) {
  for (long i = 0; i < K; i += W) /* a cache line of x at a time */
    for (long t = 0; t < T; t++)
      for (int j = 0; j < W; j++) out[(i + j) * T + t] = x[t * K + i + j];
}

static void narrow(const float *x, bf16 *out, long step, long count, long K) {
  for (long t = 0; t < count; t++)
    for (long i = 0; i < K; i += W) store(out + t * step + i, *(const vec *)(x + t * K + i));
}

typedef struct {
  long q_token, q_head, k_token, k_head, v_token, v_head; /* in elements */
  long sequences, H, G, K;                                /* H query heads share G key heads of K numbers */
  float scale;
} Shape;

static inline long heads_of(const Shape *s) { return s->H / s->G; }

/* out (tokens, H, K); log_sums (tokens, H): of each query, the logarithm of the sum of e^score */
int attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *log_sums, const int64_t *starts,
                      const Shape *s) {
  long K = s->K, R = heads_of(s), longest = 0;
  for (long i = 0; i < s->sequences; i++)
    if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
  long most = UP(longest, N);
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    float *keys = aligned_alloc(64, (3 * most * K + BLOCK * most + 2 * BLOCK * K) * sizeof(float));
    float *keys_t = keys + most * K, *values = keys_t + most * K, *scores = values + most * K;
    float *queries = scores + BLOCK * most, *sums = queries + BLOCK * K;
    failed = !keys;
#pragma omp for schedule(dynamic) collapse(2)
    for (long sequence = 0; sequence < s->sequences; sequence++)
      for (long group = 0; group < s->G; group++) {
        if (!keys) continue;
        long first = starts[sequence], T = starts[sequence + 1] - first, S = UP(T, N);
        widen(k + first * s->k_token + group * s->k_head, s->k_token, keys, T, S, K, 1);
        transpose(keys, keys_t, S, K);
        widen(v + first * s->v_token + group * s->v_head, s->v_token, values, T, S, K, 1);
        for (long head = group * R; head < (group + 1) * R; head++)
          for (long start = 0; start < T; start += BLOCK) {
            long count = T - start < BLOCK ? T - start : BLOCK, padded = UP(count, M), seen = UP(start + count, N);
            widen(q + (first + start) * s->q_token + head * s->q_head, s->q_token, queries, count, padded, K, s->scale);
            product(queries, K, 1, keys_t, S, scores, seen, padded, seen, K, 0);
            for (long t = 0; t < padded; t++) {
              float *row = scores + t * seen;
              long visible = start + t + 1; /* keys, of at least one vector's */
              for (long j = visible; j < seen; j++) row[j] = -INFINITY;
              long vectors = UP(visible, W) < seen ? UP(visible, W) : seen;
              vec top = *(vec *)row, total = {0};
              for (long j = W; j < vectors; j += W) top = larger(*(vec *)(row + j), top);
              float peak = largest(top);
              for (long j = 0; j < vectors; j += W) {
                vec p = exponential(*(vec *)(row + j) - peak);
                p = choose(*(vec *)(row + j) == -INFINITY - (vec){0}, (vec){0}, p);
                *(vec *)(row + j) = p;
                total += p;
              }
              float mass = sum(total);
              for (long j = 0; j < vectors; j += W) *(vec *)(row + j) *= 1 / mass;
              for (long j = vectors; j < seen; j++) row[j] = 0;
              if (t < count) log_sums[(first + start + t) * s->H + head] = peak + logf(mass);
            }
            product(scores, seen, 1, values, K, sums, K, padded, K, seen, 0);
            narrow(sums, out + ((first + start) * s->H + head) * K, s->H * K, count, K);
          }
      }
    free(keys);
  }
  return failed;
}

/* dV = PᵀdO; dS = P ∘ (dO Vᵀ − rows' sums of dO ∘ O); dQ = dS K; dK = dSᵀ Q. d_q (tokens, H, K), d_k and d_v (tokens, G,
   K). P is computed again from the log_sums. */
int attention_backward(const bf16 *grad, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out,
                       const float *log_sums, bf16 *d_q, bf16 *d_k, bf16 *d_v, const int64_t *starts, const Shape *s) {
  long K = s->K, R = heads_of(s), longest = 0;
  for (long i = 0; i < s->sequences; i++)
    if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
  long most = UP(longest, N);
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    float *keys = aligned_alloc(64, (5 * most * K + 2 * BLOCK * most + 3 * BLOCK * K) * sizeof(float));
    float *keys_t = keys + most * K, *values_t = keys_t + most * K, *k_sums = values_t + most * K;
    float *v_sums = k_sums + most * K, *weights = v_sums + most * K, *d_weights = weights + BLOCK * most;
    float *queries = d_weights + BLOCK * most, *grads = queries + BLOCK * K, *q_sums = grads + BLOCK * K;
    failed = !keys;
#pragma omp for schedule(dynamic) collapse(2)
    for (long sequence = 0; sequence < s->sequences; sequence++)
      for (long group = 0; group < s->G; group++) {
        if (!keys) continue;
        long first = starts[sequence], T = starts[sequence + 1] - first, S = UP(T, N);
        widen(v + first * s->v_token + group * s->v_head, s->v_token, keys, T, S, K, 1);
        transpose(keys, values_t, S, K);
        widen(k + first * s->k_token + group * s->k_head, s->k_token, keys, T, S, K, 1);
        transpose(keys, keys_t, S, K);
        memset(k_sums, 0, 2 * most * K * sizeof(float)); /* v_sums too */
        for (long head = group * R; head < (group + 1) * R; head++)
          for (long start = 0; start < T; start += BLOCK) {
            long count = T - start < BLOCK ? T - start : BLOCK, padded = UP(count, M), seen = UP(start + count, N);
            long at = ((first + start) * s->H + head) * K;
            widen(q + (first + start) * s->q_token + head * s->q_head, s->q_token, queries, count, padded, K, s->scale);
            widen(grad + at, s->H * K, grads, count, padded, K, 1);
            product(queries, K, 1, keys_t, S, weights, seen, padded, seen, K, 0);
            product(grads, K, 1, values_t, S, d_weights, seen, padded, seen, K, 0);
            for (long t = 0; t < padded; t++) {
              float *row = weights + t * seen, *d_row = d_weights + t * seen;
              long visible = t < count ? start + t + 1 : 0, vectors = UP(visible, W);
              float log_sum = t < count ? log_sums[(first + start + t) * s->H + head] : 0;
              vec products = {0};
              for (long i = 0; t < count && i < K; i += W)
                products += load(out + at + t * s->H * K + i) * *(vec *)(grads + t * K + i);
              float mean = sum(products);
              for (long j = 0; j < vectors; j += W) {
                vec p = exponential(*(vec *)(row + j) - log_sum);
                *(vec *)(row + j) = p;
                *(vec *)(d_row + j) = p * (*(vec *)(d_row + j) - mean);
              }
              for (long j = visible; j < seen; j++) row[j] = d_row[j] = 0;
            }
            product(d_weights, seen, 1, keys, K, q_sums, K, padded, K, seen, 0);
            for (long i = 0; i < count * K; i += W) *(vec *)(q_sums + i) *= s->scale;
            narrow(q_sums, d_q + at, s->H * K, count, K);
            /* the queries have the scale already */
            product(d_weights, 1, seen, queries, K, k_sums, K, seen, K, padded, 1);
            product(weights, 1, seen, grads, K, v_sums, K, seen, K, padded, 1);
          }
        narrow(k_sums, d_k + (first * s->G + group) * K, s->G * K, T, K);
        narrow(v_sums, d_v + (first * s->G + group) * K, s->G * K, T, K);
      }
    free(keys);
  }
  return failed;
}
