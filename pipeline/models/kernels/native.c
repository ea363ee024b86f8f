/* What a training step in bf16 computes beside its matrix products, each in one pass over memory. native.py compiles it.

   bf16 in and out, fp32 inside. A row, or a sequence's head group, is computed by one thread in a fixed order, so that
   the numbers depend neither on the number of threads nor on the run. Vectors are GCC's and Clang's own: the compiler
   makes of them what the CPU has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define W 16 /* numbers of a vector */
typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * W), aligned(2)));

static inline vec all(float x) { return x - (vec){0}; }
static inline vec choose(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }

/* What GCC 12 makes of conversions and comparisons takes up to five instructions. Of two numbers with a NaN, `larger` and
   `smaller` give the second. */
#ifdef __AVX512BW__
static inline bits widened(const bf16 *x) { return (bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x)); }
static inline void put(bf16 *x, bits u) { _mm256_storeu_si256((void *)x, _mm512_cvtepi32_epi16((__m512i)u)); }
static inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline bits widened(const bf16 *x) { return __builtin_convertvector(*(const halves *)x, bits); }
static inline void put(bf16 *x, bits u) { *(halves *)x = __builtin_convertvector(u, halves); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }
static inline vec smaller(vec a, vec b) { return choose(a < b, a, b); }
#endif

static inline vec load(const bf16 *x) { return (vec)(widened(x) << 16); }

/* to the nearest bf16, ties to even, in the upper half */
static inline bits rounded(vec value) { return (bits)value + 0x7fff + (((bits)value >> 16) & 1); }

#ifdef __AVX512BF16__ /* the same in one instruction, but for numbers below 2^-126, which become 0 */
static inline void store(bf16 *x, vec value) {
  _mm256_storeu_si256((void *)x, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
#else
static inline void store(bf16 *x, vec value) { put(x, rounded(value) >> 16); }
#endif

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
  x = larger(all(-87), smaller(all(88), x));
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
   and values. A thread has one head group of one sequence.

   Products read bf16 in pairs, a word each, which AVX512-BF16 multiplies at twice the rate of floats: the pair is two
   neighbours of the sum. So rows of queries and keys are pairs as they are, and what is summed over tokens has pairs of
   tokens. Sums are floats. */

#define M 8        /* rows of a tile */
#define N (2 * W)  /* its columns */
#define BLOCK 32   /* queries whose scores are in memory at once */
#define UP(x, to) (((x) + (to) - 1) / (to) * (to))
typedef uint32_t word;

static inline vec add_products(vec total, bits a, bits b) {
#ifdef __AVX512BF16__
  return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
  total += (vec)(a << 16) * (vec)(b << 16);
  return total + (vec)(a & 0xffff0000) * (vec)(b & 0xffff0000);
#endif
}

/* c (M, N) = a (M, words) · b (words, N) over words `from` to `to`, or added to it; word d of row m is at m·a_m + d·a_d */
static inline __attribute__((always_inline)) void tile(const word *a, long a_m, long a_d, const word *b, long b_d,
                                                       float *c, long c_m, long from, long to, int add) {
  vec left[M], right[M];
  for (int m = 0; m < M; m++) {
    left[m] = add ? *(vec *)(c + m * c_m) : (vec){0};
    right[m] = add ? *(vec *)(c + m * c_m + W) : (vec){0};
  }
  for (long d = from; d < to; d++) {
    bits b0 = *(const bits *)(b + d * b_d), b1 = *(const bits *)(b + d * b_d + W);
    for (int m = 0; m < M; m++) {
      bits x = a[m * a_m + d * a_d] - (bits){0};
      left[m] = add_products(left[m], x, b0);
      right[m] = add_products(right[m], x, b1);
    }
  }
  for (int m = 0; m < M; m++) {
    *(vec *)(c + m * c_m) = left[m];
    *(vec *)(c + m * c_m + W) = right[m];
  }
}

/* scores (rows, seen) = a (rows, K) · keys (K, seen), both bf16, of keys transposed as words with S a row */
static void scores_of(const word *a, const word *keys, long S, float *scores, long rows, long seen, long K) {
  for (long n = 0; n < seen; n += N)
    for (long m = 0; m < rows; m += M)
      tile(a + m * K / 2, K / 2, 1, keys + n, S, scores + m * seen + n, seen, 0, K / 2, 0);
}

/* sums (rows, K) = weights (rows, seen) · values (seen, K): bf16 at the start of rows of `seen` words, and pairs of
   tokens. Row m sees no key after start + m. */
static void sum_of_keys(const word *weights, const word *values, float *sums, long rows, long start, long seen, long K) {
  for (long n = 0; n < K; n += N)
    for (long m = 0; m < rows; m += M)
      tile(weights + m * seen, seen, 1, values + n, K, sums + m * K + n, K, 0, (start + m + M) / 2, 0);
}

/* sums (start + count, K) += weightsᵀ · queries (count, K), both pairs of tokens, those of weights 2·seen apart */
static void add_to_keys(const word *weights, const word *queries, float *sums, long start, long count, long seen,
                        long K) {
  for (long n = 0; n < K; n += N)
    for (long m = 0; m < start + count; m += M)
      tile(weights + m, 1, 2 * seen, queries + n, K, sums + m * K + n, K, m > start ? (m - start) / 2 : 0,
           (count + 1) / 2, 1);
}

/* rows of bf16 end to end; those from `count` to `padded` are 0 */
static void copy(const bf16 *x, long step, word *out, long count, long padded, long K) {
  for (long t = 0; t < count; t++) memcpy(out + t * K / 2, x + t * step, K * sizeof(bf16));
  memset(out + count * K / 2, 0, (padded - count) * K * sizeof(bf16));
}

static const halves zeros[2]; /* what stands for a row after the last */

/* (T / 2, K) words: numbers of an even row in the lower halves, of the next row in the upper ones. Of `count` rows. */
static void pair_rows(const bf16 *x, long step, word *out, long count, long T, long K) {
  for (long t = 0; t < T; t += 2)
    for (long i = 0; i < K; i += W) {
      const bf16 *even = t < count ? x + t * step + i : (const bf16 *)zeros;
      const bf16 *odd = t + 1 < count ? x + (t + 1) * step + i : (const bf16 *)zeros;
      *(bits *)(out + t / 2 * K + i) = widened(even) | widened(odd) << 16;
    }
}

/* (K / 2, T) words of `count` rows of bf16: W by W of them, by four shuffles of two halves into one */
static void transpose(const bf16 *x, long step, word *out, long count, long T, long K) {
  for (long t = 0; t < T; t += W)
    for (long i = 0; i < K / 2; i += W) {
      bits now[W], next[W];
      for (int j = 0; j < W; j++) now[j] = *(const bits *)(t + j < count ? x + (t + j) * step + 2 * i : (const bf16 *)zeros);
      for (int stage = 0; stage < 4; stage++) {
        for (int j = 0; j < W / 2; j++) {
          bits a = now[j], b = now[j + W / 2];
          next[2 * j] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
          next[2 * j + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(now, next, sizeof now);
      }
      for (int j = 0; j < W; j++) *(bits *)(out + (i + j) * T + t) = now[j];
    }
}

static void narrow(const float *x, bf16 *out, long step, long count, long K, float scale) {
  for (long t = 0; t < count; t++)
    for (long i = 0; i < K; i += W) store(out + t * step + i, *(const vec *)(x + t * K + i) * scale);
}

/* 0 in the places of a vector at j from `visible` on */
static inline vec masked(vec x, long j, long visible) {
  const ints places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return j + W <= visible ? x : choose(places < (int32_t)(visible - j), x, (vec){0});
}

typedef struct {
  long q_token, q_head, k_token, k_head, v_token, v_head; /* in elements */
  long sequences, H, G, K;                                /* H query heads share G key heads of K numbers */
  float scale;
} Shape;

static inline long heads_of(const Shape *s) { return s->H / s->G; }

/* tokens of the longest sequence, as multiple of N */
static long longest_of(const int64_t *starts, const Shape *s) {
  long longest = 0;
  for (long i = 0; i < s->sequences; i++)
    if (starts[i + 1] - starts[i] > longest) longest = starts[i + 1] - starts[i];
  return UP(longest, N);
}

/* out (tokens, H, K); log_sums (tokens, H): of each query, the logarithm of the sum of e^score */
int attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *log_sums, const int64_t *starts,
                      const Shape *s) {
  long K = s->K, R = heads_of(s), most = longest_of(starts, s);
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    word *keys = aligned_alloc(64, (most * K + BLOCK * K / 2 + BLOCK * most + BLOCK * K) * sizeof(word));
    word *values = keys + most * K / 2, *queries = values + most * K / 2;
    float *scores = (float *)(queries + BLOCK * K / 2), *sums = scores + BLOCK * most;
    failed = !keys;
#pragma omp for schedule(dynamic) collapse(2)
    for (long sequence = 0; sequence < s->sequences; sequence++)
      for (long group = 0; group < s->G; group++) {
        if (!keys) continue;
        long first = starts[sequence], T = starts[sequence + 1] - first, S = UP(T, N);
        transpose(k + first * s->k_token + group * s->k_head, s->k_token, keys, T, S, K);
        pair_rows(v + first * s->v_token + group * s->v_head, s->v_token, values, T, S, K);
        for (long head = group * R; head < (group + 1) * R; head++)
          for (long start = 0; start < T; start += BLOCK) {
            long count = T - start < BLOCK ? T - start : BLOCK, padded = UP(count, M), seen = UP(start + count, N);
            float masses[BLOCK];
            copy(q + (first + start) * s->q_token + head * s->q_head, s->q_token, queries, count, padded, K);
            scores_of(queries, keys, S, scores, padded, seen, K);
            for (long t = 0; t < count; t++) {
              float *row = scores + t * seen;
              bf16 *weights = (bf16 *)row; /* in the place of scores that were read */
              long visible = start + t + 1, vectors = UP(visible, W);
              for (long j = visible; j < vectors; j++) row[j] = -INFINITY;
              vec top = *(vec *)row, total = {0};
              for (long j = W; j < vectors; j += W) top = larger(*(vec *)(row + j), top);
              float peak = largest(top) * s->scale;
              for (long j = 0; j < vectors; j += W) {
                vec p = masked(exponential(*(vec *)(row + j) * s->scale - peak), j, visible);
                store(weights + j, p);
                total += p;
              }
              masses[t] = sum(total);
              log_sums[(first + start + t) * s->H + head] = peak + logf(masses[t]);
            }
            sum_of_keys((word *)scores, values, sums, padded, start, seen, K);
            for (long t = 0; t < count; t++)
              narrow(sums + t * K, out + ((first + start + t) * s->H + head) * K, 0, 1, K, 1 / masses[t]);
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
  long K = s->K, R = heads_of(s), most = longest_of(starts, s);
  int failed = 0;
#pragma omp parallel reduction(| : failed)
  {
    word *keys = aligned_alloc(64, (3 * most * K / 2 + 2 * BLOCK * K + 2 * most * K + 2 * BLOCK * most + BLOCK * K) * sizeof(word));
    word *keys_t = keys + most * K / 2, *values_t = keys_t + most * K / 2, *queries = values_t + most * K / 2;
    word *query_pairs = queries + BLOCK * K / 2, *grads = query_pairs + BLOCK * K / 2, *grad_pairs = grads + BLOCK * K / 2;
    float *k_sums = (float *)(grad_pairs + BLOCK * K / 2), *v_sums = k_sums + most * K;
    float *weights = v_sums + most * K, *d_weights = weights + BLOCK * most, *q_sums = d_weights + BLOCK * most;
    failed = !keys;
#pragma omp for schedule(dynamic) collapse(2)
    for (long sequence = 0; sequence < s->sequences; sequence++)
      for (long group = 0; group < s->G; group++) {
        if (!keys) continue;
        long first = starts[sequence], T = starts[sequence + 1] - first, S = UP(T, N);
        const bf16 *own_keys = k + first * s->k_token + group * s->k_head;
        transpose(v + first * s->v_token + group * s->v_head, s->v_token, values_t, T, S, K);
        transpose(own_keys, s->k_token, keys_t, T, S, K);
        pair_rows(own_keys, s->k_token, keys, T, S, K);
        memset(k_sums, 0, S * K * sizeof(float));
        memset(v_sums, 0, S * K * sizeof(float));
        for (long head = group * R; head < (group + 1) * R; head++)
          for (long start = 0; start < T; start += BLOCK) {
            long count = T - start < BLOCK ? T - start : BLOCK, padded = UP(count, M), seen = UP(start + count, N);
            long at = ((first + start) * s->H + head) * K;
            const bf16 *own = q + (first + start) * s->q_token + head * s->q_head;
            copy(own, s->q_token, queries, count, padded, K);
            copy(grad + at, s->H * K, grads, count, padded, K);
            pair_rows(own, s->q_token, query_pairs, count, padded, K);
            pair_rows(grad + at, s->H * K, grad_pairs, count, padded, K);
            scores_of(queries, keys_t, S, weights, padded, seen, K);
            scores_of(grads, values_t, S, d_weights, padded, seen, K);
            for (long t = 0; t < count; t += 2) { /* two rows at a time, which are pairs for the sums over queries */
              float *rows = weights + t * seen, *d_rows = d_weights + t * seen, log_sum[2] = {0}, mean[2] = {0};
              long visible[2] = {start + t + 1, t + 1 < count ? start + t + 2 : 0}, vectors = UP(start + t + 2, W);
              for (int i = 0; i < 2 && t + i < count; i++) {
                vec products = {0};
                for (long d = at + (t + i) * s->H * K, end = d + K; d < end; d += W) products += load(out + d) * load(grad + d);
                mean[i] = sum(products);
                log_sum[i] = log_sums[(first + start + t + i) * s->H + head];
              }
              for (long j = 0; j < vectors; j += W) {
                bits p[2], d[2];
                for (int i = 0; i < 2; i++) {
                  vec x = masked(exponential(*(vec *)(rows + i * seen + j) * s->scale - log_sum[i]), j, visible[i]);
                  vec dx = x * (*(vec *)(d_rows + i * seen + j) - mean[i]);
                  p[i] = rounded(x);
                  d[i] = rounded(masked(dx, j, visible[i]));
                }
                /* in the places of numbers that were read */
                *(bits *)(rows + j) = p[0] >> 16 | (p[1] & 0xffff0000);
                *(bits *)(rows + seen + j) = d[0] >> 16 | (d[1] & 0xffff0000);
                for (int i = 0; i < 2; i++) put((bf16 *)(d_rows + i * seen) + j, d[i] >> 16);
              }
            }
            sum_of_keys((word *)d_weights, keys, q_sums, padded, start, seen, K);
            narrow(q_sums, d_q + at, s->H * K, count, K, s->scale);
            add_to_keys((word *)weights, grad_pairs, v_sums, start, count, seen, K);
            add_to_keys((word *)weights + seen, query_pairs, k_sums, start, count, seen, K);
          }
        narrow(k_sums, d_k + (first * s->G + group) * K, s->G * K, T, K, s->scale);
        narrow(v_sums, d_v + (first * s->G + group) * K, s->G * K, T, K, 1);
      }
    free(keys);
  }
  return failed;
}
