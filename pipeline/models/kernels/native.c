/* What a training step in bf16 computes beside its matrix products, each in one pass over memory; MiniGPT's block with
   many adapters, whole, in fp32; and the next token of sequences through Llama's blocks. native.py compiles it.

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
#if defined(__AMX_BF16__) && defined(__linux__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
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
  float lanes[W];
  *(vec *)lanes = x;
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
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

/* ---- Cross-entropy of rows of logits (rows, V) with a label each, and its gradient softmax − onehot, unless 0. Not 0 if
   there is no logit for a label: nothing was computed then. */

int cross_entropy(const bf16 *logits, const int64_t *labels, float *losses, bf16 *grad, long rows, long V) {
  long whole = V / W * W;
  for (long row = 0; row < rows; row++)
    if (labels[row] < 0 || labels[row] >= V) return 1;
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
  return 0;
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

/* ---- MiniGPT's block with the low-rank updates of L adapters, in fp32 (low_rank_block.py). D and F are multiples of N,
   D/H of W; the rank, the rows of an adapter and the lengths of its sequences are any. An adapter's numbers depend on
   its own rows only, and not on how many others there are. Panels: (columns/N, depth, N). One thread. */

typedef struct {
  long L, rows, D, F, H, R, sequences; /* `rows` of each adapter */
  float scale, eps[2];
  const float *norms[2][2], *attention[4][2], *fc1[2], *fc2[2]; /* weight and bias each; attention: q, k, v, out */
  const float *A[4], *B[4];                                    /* (R, D) and (D, R) of the first adapter */
  long A_step[4], B_step[4];                                   /* to the next one's */
  const int64_t *starts;
} Block;

#define ROWS 128 /* of a product's left side, which stay in a core's cache while the panels pass */

/* c (rows, N) = a (rows, depth) · b (depth, N), or added to it; element (m, d) of a is at m·a_m + d·a_d; rows ≤ M */
static inline __attribute__((always_inline)) void tile_floats(const float *a, long a_m, long a_d, const float *b, long b_d,
                                                              float *c, long c_m, const int rows, long depth, int add) {
  vec left[M], right[M];
  for (int m = 0; m < rows; m++) {
    left[m] = add ? *(vec *)(c + m * c_m) : (vec){0};
    right[m] = add ? *(vec *)(c + m * c_m + W) : (vec){0};
  }
  for (long d = 0; d < depth; d++) {
    vec b0 = *(const vec *)(b + d * b_d), b1 = *(const vec *)(b + d * b_d + W);
    for (int m = 0; m < rows; m++) {
      float x = a[m * a_m + d * a_d];
      left[m] += x * b0;
      right[m] += x * b1;
    }
  }
  for (int m = 0; m < rows; m++) {
    *(vec *)(c + m * c_m) = left[m];
    *(vec *)(c + m * c_m + W) = right[m];
  }
}

/* `sum` four additions deep instead of sixteen, which counts where rows are a vector or two */
static inline float fold(vec x) {
  typedef float half __attribute__((vector_size(2 * W), aligned(4)));
  half h = *(half *)&x + *((half *)&x + 1);
  return ((h[0] + h[1]) + (h[2] + h[3])) + ((h[4] + h[5]) + (h[6] + h[7]));
}

/* `scale` times wᵀ, w (columns, depth), into panels from column c on */
static void pack_turned(const float *w, long columns, long depth, long c, float scale, float *out) {
  for (long j = 0; j < columns; j++) {
    float *to = out + (c + j) / N * depth * N + (c + j) % N;
    for (long i = 0; i < depth; i++) to[i * N] = scale * w[j * depth + i];
  }
}

/* c (rows, columns) = a (rows, depth) · b (depth, columns), or added to it, of any number of rows; b_n: from N columns of b to the next */
static void multiply(const float *a, long a_m, long a_d, const float *b, long b_d, long b_n, float *c, long c_m, long rows,
                     long columns, long depth, int add) {
  for (long first = 0; first < rows; first += ROWS)
    for (long n = 0; n < columns; n += N) {
      const float *panel = b + n / N * b_n;
      long m = first, stop = first + ROWS < rows ? first + ROWS : rows;
#define TILES(size) \
  for (; m + size <= stop; m += size) tile_floats(a + m * a_m, a_m, a_d, panel, b_d, c + m * c_m + n, c_m, size, depth, add);
      TILES(M) TILES(4) TILES(1)
    }
}

static void multiply_panels(const float *a, long a_m, const float *panels, float *c, long c_m, long rows, long columns,
                            long depth, int add) {
  multiply(a, a_m, 1, panels, N, N * depth, c, c_m, rows, columns, depth, add);
}

/* every row is `bias`, plus its own of `more` (rows, width) unless that is 0 */
static void fill(float *out, const float *bias, const float *more, long rows, long width, long step) {
  for (long row = 0; row < rows; row++)
    for (long i = 0; i < width; i += W) {
      vec x = *(const vec *)(bias + i);
      if (more) x += *(const vec *)(more + row * width + i);
      *(vec *)(out + row * step + i) = x;
    }
}

static void norm_forward(const float *x, const float *const *layer, float eps, float *out, float *stats, long rows, long D) {
  for (long row = 0; row < rows; row++, x += D, out += D) {
    vec total = {0}, squares = {0};
    for (long i = 0; i < D; i += W) total += *(const vec *)(x + i);
    float mean = fold(total) / D;
    for (long i = 0; i < D; i += W) squares += (*(const vec *)(x + i) - mean) * (*(const vec *)(x + i) - mean);
    float r = 1 / sqrtf(fold(squares) / D + eps);
    stats[2 * row] = mean, stats[2 * row + 1] = r;
    for (long i = 0; i < D; i += W)
      *(vec *)(out + i) = (*(const vec *)(x + i) - mean) * r * *(const vec *)(layer[0] + i) + *(const vec *)(layer[1] + i);
  }
}

/* With n = (x − mean)·r and h = g∘w: dx = r·(h − mean(h) − n·mean(h∘n)), plus `passed`. */
static void norm_backward(const float *g, const float *passed, const float *x, const float *weight, const float *stats,
                          float *d_x, long rows, long D) {
  for (long row = 0; row < rows; row++, g += D, x += D, passed += D, d_x += D) {
    float mean = stats[2 * row], r = stats[2 * row + 1];
    vec total = {0}, products = {0};
    for (long i = 0; i < D; i += W) {
      vec h = *(const vec *)(g + i) * *(const vec *)(weight + i);
      total += h;
      products += h * (*(const vec *)(x + i) - mean);
    }
    float first = fold(total) / D, second = fold(products) * r * r / D;
    for (long i = 0; i < D; i += W) {
      vec h = *(const vec *)(g + i) * *(const vec *)(weight + i);
      *(vec *)(d_x + i) = (h - first - (*(const vec *)(x + i) - mean) * second) * r + *(const vec *)(passed + i);
    }
  }
}

/* Φ(x), the normal distribution, within 1e-7 (Abramowitz & Stegun 7.1.26, as torch's), and e^(−x²/2) */
static inline vec normal(vec x, vec *bell) {
  vec z = choose(x < 0, -x, x) * 0.70710678f, t = 1 / (1 + z * 0.3275911f);
  *bell = exponential(-z * z);
  vec tail = ((((t * 1.061405429f - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  tail *= *bell * 0.5f;
  return choose(x < 0, tail, 1 - tail);
}

/* out (T,) = scale · q·keys for the first `seen` keys; keys_t (K, S) */
static inline void scores(const float *q, const float *keys_t, long S, long K, long seen, float scale, float *out) {
  for (long j = 0; j < seen; j += W) {
    vec even = {0}, odd = {0};
    for (long i = 0; i < K; i += 2) {
      even += q[i] * *(const vec *)(keys_t + i * S + j);
      odd += q[i + 1] * *(const vec *)(keys_t + (i + 1) * S + j);
    }
    *(vec *)(out + j) = (even + odd) * scale;
  }
}

/* The weights (T,) of the keys that the query at `q` sees, in the last vector 0 for the others */
static inline void attend(const float *q, const float *keys_t, long S, long K, long seen, float scale, float *p) {
  scores(q, keys_t, S, K, seen, scale, p);
  long last = (seen - 1) / W * W;
  ints hidden = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} >= (int)(seen - last);
  vec most = all(-INFINITY), total = {0};
  *(vec *)(p + last) = choose(hidden, most, *(vec *)(p + last));
  float top = p[0];
  if (seen <= 8) /* the usual few */
    for (long j = 1; j < seen; j++) top = p[j] > top ? p[j] : top;
  else {
    for (long j = 0; j < seen; j += W) most = larger(*(vec *)(p + j), most);
    top = largest(most);
  }
  for (long j = 0; j < seen; j += W) {
    vec share = exponential(*(vec *)(p + j) - top);
    if (j == last) share = choose(hidden, (vec){0}, share);
    *(vec *)(p + j) = share;
    total += share;
  }
  float mass = fold(total);
  for (long j = 0; j < seen; j += W) *(vec *)(p + j) *= 1 / mass;
}

static void turn(const float *x, long step, float *out, long T, long S, long K) {
  for (long t = 0; t < T; t++)
    for (long i = 0; i < K; i++) out[i * S + t] = x[t * step + i];
}

/* `room` is for (2K + 2, S), S the longest sequence's length as a multiple of W */
static void block_attention(const Block *s, const float *qkv, float *out, float *room) {
  long D = s->D, K = D / s->H, step = 3 * D;
  float scale = 1 / sqrtf(K);
  for (long sequence = 0; sequence < s->sequences; sequence++) {
    long first = s->starts[sequence], T = s->starts[sequence + 1] - first, S = UP(T, W);
    float *p = room + K * S;
    for (const float *q = qkv + first * step, *end = q + D; q < end; q += K) {
      turn(q + D, step, room, T, S, K);
      for (long t = 0; t < T; t++) {
        attend(q + t * step, room, S, K, t + 1, scale, p);
        float *y = out + (first + t) * D + (q - qkv - first * step);
        for (long i = 0; i < K; i += W) {
          vec total = {0};
          for (long j = 0; j <= t; j++) total += p[j] * *(const vec *)(q + 2 * D + j * step + i);
          *(vec *)(y + i) = total;
        }
      }
    }
  }
}

static void block_attention_backward(const Block *s, const float *grad, const float *qkv, float *d_qkv, float *room) {
  long D = s->D, K = D / s->H, step = 3 * D;
  float scale = 1 / sqrtf(K);
  memset(d_qkv, 0, s->L * s->rows * step * sizeof(float));
  for (long sequence = 0; sequence < s->sequences; sequence++) {
    long first = s->starts[sequence], T = s->starts[sequence + 1] - first, S = UP(T, W);
    float *values_t = room + K * S, *p = values_t + K * S, *d_p = p + S;
    for (long head = 0; head < D; head += K) {
      const float *q = qkv + first * step + head, *g = grad + first * D + head;
      float *d_q = d_qkv + first * step + head;
      turn(q + D, step, room, T, S, K);
      turn(q + 2 * D, step, values_t, T, S, K);
      for (long t = 0; t < T; t++) {
        attend(q + t * step, room, S, K, t + 1, scale, p);
        scores(g + t * D, values_t, S, K, t + 1, 1, d_p);
        vec products = {0};
        for (long j = 0; j <= t; j += W) products += *(vec *)(p + j) * *(vec *)(d_p + j);
        float mean = fold(products);
        for (long j = 0; j <= t; j += W) *(vec *)(d_p + j) = *(vec *)(p + j) * (*(vec *)(d_p + j) - mean) * scale;
        for (long i = 0; i < K; i += W) {
          vec d = {0}, own = *(const vec *)(q + t * step + i), of_out = *(const vec *)(g + t * D + i);
          for (long j = 0; j <= t; j++) {
            d += d_p[j] * *(const vec *)(q + D + j * step + i);
            *(vec *)(d_q + D + j * step + i) += d_p[j] * own;
            *(vec *)(d_q + 2 * D + j * step + i) += p[j] * of_out;
          }
          *(vec *)(d_q + t * step + i) = d;
        }
      }
    }
  }
}

/* out (rows, count·D) of x (rows, D) by the linears of attention from `first` on, with bias and `more`; low = Ax */
static void updated_forward(const Block *s, long first, long count, const float *x, const float *more, float *out,
                            float *low, long low_step, float *room) {
  long D = s->D, R = s->R, n = s->L * s->rows, wide = UP(count * R, N);
  for (long i = 0; i < count; i++) {
    pack_turned(s->attention[first + i][0], D, D, i * D, 1, room);
    fill(out + i * D, s->attention[first + i][1], more, n, D, count * D);
  }
  multiply_panels(x, D, room, out, count * D, n, count * D, D, 1);
  memset(room, 0, wide * D * sizeof(float));
  float *up = room + wide * D;
  for (long l = 0; l < s->L; l++) {
    float *own = low + l * s->rows * low_step;
    for (long i = 0; i < count; i++)
      pack_turned(s->A[first + i] + l * s->A_step[first + i], R, D, i * R, 1, room);
    multiply_panels(x + l * s->rows * D, D, room, own, low_step, s->rows, wide, D, 0);
    for (long i = 0; i < count; i++) {
      pack_turned(s->B[first + i] + l * s->B_step[first + i], D, R, 0, s->scale, up);
      multiply_panels(own + i * R, low_step, up, out + l * s->rows * count * D + i * D, count * D, s->rows, D, R, 1);
    }
  }
}

/* With g = ∂L/∂y and l = Ax: ∂B = s·gᵀl, ∂l = s·gB, ∂A = (∂l)ᵀx, ∂x = gW + ∂l·A (the document's §4.3); d_x unless 0. */
static void updated_backward(const Block *s, long first, long count, const float *g, const float *x, const float *low,
                             long low_step, float *d_x, float *const *d_factors, float *room) {
  long D = s->D, R = s->R, wide = UP(count * R, N), deep = count * D;
  for (long i = 0; d_x && i < count; i++)
    multiply(g + i * D, deep, 1, s->attention[first + i][0], D, N, d_x, D, s->L * s->rows, D, D, i > 0);
  float *d_low = room + wide * deep, *turned = d_low + s->rows * wide;
  memset(room, 0, wide * deep * sizeof(float)); /* the factors B, one after the other in depth and in columns */
  for (long l = 0; l < s->L; l++) {
    const float *own_g = g + l * s->rows * deep, *own_x = x + l * s->rows * D, *own = low + l * s->rows * low_step;
    for (long i = 0; i < count; i++) {
      const float *B = s->B[first + i] + l * s->B_step[first + i];
      for (long o = 0; o < D; o++)
        for (long r = 0; r < R; r++) room[(i * D + o) * wide + i * R + r] = s->scale * B[o * R + r];
    }
    multiply(own_g, deep, 1, room, wide, N, d_low, wide, s->rows, wide, deep, 0);
    for (long i = 0; i < count; i++) {
      const float *A = s->A[first + i] + l * s->A_step[first + i];
      multiply(d_low + i * R, 1, wide, own_x, D, N, d_factors[first + i] + l * R * D, D, R, D, s->rows, 0);
      if (d_x) multiply(d_low + i * R, wide, 1, A, D, N, d_x + l * s->rows * D, D, s->rows, D, R, 1);
      multiply(own + i * R, 1, low_step, own_g + i * D, deep, N, turned, D, R, D, s->rows, 0);
      float *out = d_factors[4 + first + i] + l * R * D;
      for (long r = 0; r < R; r++)
        for (long o = 0; o < D; o++) out[o * R + r] = s->scale * turned[r * D + o];
    }
  }
}

/* What forward keeps for backward, one after the other: (rows, …) each */
typedef struct {
  float *stats[2], *n1, *qkv, *merged, *attended, *u, *low;
  long low_step, of_out; /* from one row of `low` to the next, and to the part of `out` */
} Kept;

static Kept kept_in(const Block *s, float *at) {
  long n = s->L * s->rows, D = s->D, of_out = UP(3 * s->R, N);
  float *stats = at + n * (6 * D + s->F), *low = stats + 4 * n;
  return (Kept){{stats, stats + 2 * n}, at,  at + n * D, at + 4 * n * D,         at + 5 * n * D,
                at + 6 * n * D,         low, of_out + UP(s->R, N), of_out};
}

void low_rank_forward(const Block *s, const float *x, float *out, float *kept, float *room) {
  long n = s->L * s->rows, D = s->D, F = s->F;
  Kept k = kept_in(s, kept);
  norm_forward(x, s->norms[0], s->eps[0], k.n1, k.stats[0], n, D);
  updated_forward(s, 0, 3, k.n1, 0, k.qkv, k.low, k.low_step, room);
  block_attention(s, k.qkv, k.merged, room);
  updated_forward(s, 3, 1, k.merged, x, k.attended, k.low + k.of_out, k.low_step, room);
  float *n2 = room, *hidden = n2 + n * D, *panels = hidden + n * F;
  norm_forward(k.attended, s->norms[1], s->eps[1], n2, k.stats[1], n, D);
  pack_turned(s->fc1[0], F, D, 0, 1, panels);
  fill(k.u, s->fc1[1], 0, n, F, F);
  multiply_panels(n2, D, panels, k.u, F, n, F, D, 1);
  for (long i = 0; i < n * F; i += W) {
    vec u = *(vec *)(k.u + i), bell;
    *(vec *)(hidden + i) = u * normal(u, &bell);
  }
  pack_turned(s->fc2[0], D, F, 0, 1, panels);
  fill(out, s->fc2[1], k.attended, n, D, D);
  multiply_panels(hidden, F, panels, out, D, n, D, F, 1);
}

/* d_x may be 0; gradients of the factors: A of q, k, v and out, (L, R, D) each, then B, (L, D, R) */
void low_rank_backward(const Block *s, const float *g, const float *x, float *kept, float *d_x, float *const *d_factors,
                       float *room) {
  long n = s->L * s->rows, D = s->D, F = s->F;
  Kept k = kept_in(s, kept);
  float *d_attended = room, *d_rows = d_attended + n * D, *d_u = d_rows + n * D, *d_qkv = d_u;
  float *panels = d_u + n * (F > 3 * D ? F : 3 * D);
  multiply(g, D, 1, s->fc2[0], F, N, d_u, F, n, F, D, 0);
  for (long i = 0; i < n * F; i += W) {
    vec u = *(vec *)(k.u + i), bell, share = normal(u, &bell);
    *(vec *)(d_u + i) *= share + u * bell * 0.39894228f;
  }
  multiply(d_u, F, 1, s->fc1[0], D, N, d_rows, D, n, D, F, 0);
  norm_backward(d_rows, g, k.attended, s->norms[1][0], k.stats[1], d_attended, n, D);
  updated_backward(s, 3, 1, d_attended, k.merged, k.low + k.of_out, k.low_step, d_rows, d_factors, panels);
  block_attention_backward(s, d_rows, k.qkv, d_qkv, panels);
  updated_backward(s, 0, 3, d_qkv, k.n1, k.low, k.low_step, d_x ? d_rows : 0, d_factors, panels);
  if (d_x) norm_backward(d_rows, d_attended, x, s->norms[0][0], k.stats[0], d_x, n, D);
}

/* ---- Linears in bf16, and Llama's blocks for the next token of each of some sequences (decode.py).

   Weights stay in torch's layout (outputs, inputs), and are read once for every 32 rows of x. A row's numbers depend
   neither on the rows beside it nor on the number of threads: each is summed in one order. With AMX, 16 rows of weights
   are the left tile as they are; the right one has the words of up to 16 rows of x as columns. */

static int tiles = 0;

/* Whether products use AMX from now on: if `wanted` and the kernel of the system allows it */
int use_tiles(int wanted) {
#ifdef AMX
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  tiles = wanted && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#endif
  return tiles;
}

/* What a thread does before products with `columns` rows of x at a time, 0: with none any more */
static void set_tiles(long columns) {
#ifdef AMX
  if (!tiles) return;
  if (!columns) {
    _tile_release();
    return;
  }
  struct __attribute__((packed)) {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16]; /* of a row of each tile */
    uint8_t rows[16];
  } config = {1};
  for (int t = 0; t < 8; t++) config.rows[t] = 16, config.bytes[t] = t == 4 || t == 5 ? 64 : 4 * columns;
  _tile_loadconfig(&config);
#endif
}

/* c (high, columns) = w · x for `rows` (1 to 4) of x from m on; a row of w is `step` bytes from the next */
static inline __attribute__((always_inline)) void dots(const char *w, long step, const int high, const word *x, const int rows,
                                                       long m, long columns, long words, float *c) {
  for (int o = 0; o < high; o += 4) {
    vec totals[4][4] = {0};
    for (long d = 0; d < words; d += W)
      for (int i = 0; i < 4; i++) {
        bits b = *(const bits *)(w + (o + i) * step + 4 * d);
        for (int j = 0; j < rows; j++) totals[i][j] = add_products(totals[i][j], b, *(const bits *)(x + (m + j) * words + d));
      }
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < rows; j++) c[(o + i) * columns + m + j] = fold(totals[i][j]);
  }
}

#define TILE 256 /* floats */

/* Tile 2·i + j of c is (16, columns): rows 16·i of w times group j of x, which `pack` wrote; `high` and `wide` are 1 or 2 */
static void panel(const bf16 *weight, long step, int high, const word *x, long columns, int wide, long words, float *c) {
  const char *w = (const char *)weight;
  step *= sizeof(bf16);
#ifdef AMX
  if (tiles) {
    const char *lower = w + 16 * step;
    const word *next = x + columns * words;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long d = 0; d < words; d += W) {
      _tile_loadd(6, x + d * columns, 4 * columns);
      _tile_loadd(4, w + 4 * d, step);
      _tile_dpbf16ps(0, 4, 6);
      if (wide > 1) {
        _tile_loadd(7, next + d * columns, 4 * columns);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (high > 1) {
        _tile_loadd(5, lower + 4 * d, step);
        _tile_dpbf16ps(2, 5, 6);
        if (wide > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, 4 * columns);
    if (wide > 1) _tile_stored(1, c + TILE, 4 * columns);
    if (high > 1) _tile_stored(2, c + 2 * TILE, 4 * columns);
    if (high > 1 && wide > 1) _tile_stored(3, c + 3 * TILE, 4 * columns);
    return;
  }
#endif
  for (int i = 0; i < high; i++)
    for (int j = 0; j < wide; j++) {
      const char *from = w + 16 * i * step;
      const word *group = x + j * columns * words;
      float *to = c + (2 * i + j) * TILE;
      long m = 0;
      for (; m + 4 <= columns; m += 4) dots(from, step, 16, group, 4, m, columns, words, to);
      for (; m < columns; m++) dots(from, step, 16, group, 1, m, columns, words, to);
    }
}

/* Groups of `columns` rows of x (rows, 2·words), `turned` as the right side of `panel` or as they are; what is after the last
   is 0 */
static void pack(const bf16 *x, word *out, long rows, long columns, long words, int turned) {
#pragma omp for schedule(static)
  for (long first = 0; first < rows; first += columns) {
    long count = rows - first < columns ? rows - first : columns;
    const bf16 *from = x + first * 2 * words;
    word *to = out + first * words;
    if (!turned)
      copy(from, 2 * words, to, count, columns, 2 * words);
    else if (columns == W)
      transpose(from, 2 * words, to, count, W, 2 * words);
    else
      for (long n = 0; n < count; n++)
        for (long d = 0; d < words; d++) memcpy(to + d * columns + n, from + 2 * (n * words + d), sizeof(word));
  }
}

typedef struct {
  const bf16 *A, *B; /* (rank, inputs) and (outputs / 16, rank, 16) */
  long rank;         /* a multiple of 4; 0: nothing is added */
  float scale;
} LowRank;

typedef struct {
  const bf16 *weight, *bias; /* (outputs, inputs) and (outputs,), which may be 0; without weights nothing is computed */
  long outputs;
  const LowRank *updates; /* of each row of x, or 0 */
  const bits *codes;      /* in place of weights, or 0: q8_0, (outputs / 16, inputs / 4, 16, 4), each code 128 higher */
  const float *scales;    /* of 32 weights: (outputs / 16, inputs / 32, 16) */
} Part;

#define Q8 32 /* numbers of a scale */

/* x (rows, inputs) as `q8_dots` reads it. Of each 32 numbers: 32 high and 32 low bytes of them in 16 bits, what undoes the
   codes' 128, and their scale. */
typedef struct {
  int32_t *bytes, *starts;
  float *scales;
} Q8Rows;

static Q8Rows q8_rows(word *room, long rows, long inputs) {
  int32_t *bytes = (int32_t *)room, *starts = bytes + rows * inputs / 2;
  return (Q8Rows){bytes, starts, (float *)(starts + rows * inputs / Q8)};
}

/* A number that is not finite makes its scale so too, and with it what is multiplied */
static void q8_split(const bf16 *x, Q8Rows to, long count) {
#pragma omp for schedule(static)
  for (long i = 0; i < count; i += Q8) {
    vec halves[2] = {load(x + i), load(x + i + W)}, magic = all(12582912); /* as in `exponential` */
    ints signless = (ints){0} + 0x7fffffff, total = {0};
    float peak = largest(larger((vec)((ints)halves[0] & signless), (vec)((ints)halves[1] & signless)));
    int8_t *high = (int8_t *)(to.bytes + i / 2), *low = high + Q8;
    for (int half = 0; half < 2; half++) {
      ints code = (ints)(halves[half] * (peak > 0 ? 127 * 256 / peak : 0) + magic) - (ints)magic, top = (code + 128) >> 8;
      total += code;
      for (int k = 0; k < W; k++) high[half * W + k] = top[k], low[half * W + k] = code[k] - 256 * top[k];
    }
    int32_t all_codes = 0;
    for (int k = 0; k < W; k++) all_codes += total[k];
    to.starts[i / Q8] = -128 * all_codes;
    to.scales[i / Q8] = (peak + sum((halves[0] + halves[1]) * 0)) / (127 * 256);
  }
}

/* t + the sum of four products in each lane: bytes of w from 0 to 255 by the signed ones of x */
static inline ints add_bytes(ints t, bits w, int32_t x) {
#ifdef __AVX512VNNI__
  return (ints)_mm512_dpbusd_epi32((__m512i)t, (__m512i)w, _mm512_set1_epi32(x));
#else
  for (int j = 0; j < 4; j++) t += (ints)(w >> 8 * j & 255) * (int8_t)(x >> 8 * j);
  return t;
#endif
}

/* y[j] = 16 outputs of row n + j, for 1 to 8 rows. Sums of 32 products are exact. */
static inline __attribute__((always_inline)) void q8_dots(const bits *codes, const float *scales, Q8Rows x, long n, const int rows,
                                                          long inputs, vec *y) {
  long blocks = inputs / Q8;
  for (int j = 0; j < rows; j++) y[j] = (vec){0};
  for (long b = 0; b < blocks; b++, scales += W) {
    ints high[8], low[8];
    for (int j = 0; j < rows; j++) high[j] = (ints){0}, low[j] = (ints){0} + x.starts[(n + j) * blocks + b];
    for (int k = 0; k < Q8 / 4; k++, codes++) {
      __builtin_prefetch((const char *)codes + 1024); /* 1.2 × the speed for one row */
      for (int j = 0; j < rows; j++) {
        const int32_t *bytes = x.bytes + ((n + j) * blocks + b) * (Q8 / 2) + k;
        high[j] = add_bytes(high[j], *codes, bytes[0]);
        low[j] = add_bytes(low[j], *codes, bytes[Q8 / 4]);
      }
    }
    vec scale = *(const vec *)scales;
    for (int j = 0; j < rows; j++)
      y[j] += __builtin_convertvector((high[j] << 8) + low[j], vec) * (scale * x.scales[(n + j) * blocks + b]);
  }
}

/* The weights of 16 outputs in bf16, turned as the right side of `panel` */
static void q8_widen(const bits *codes, const float *scales, word *out, long inputs) {
  for (long i = 0; i < inputs; i += 4, codes++) {
    __builtin_prefetch((const char *)codes + 1024);
    for (int j = 0; j < 4; j += 2, out += W) {
      vec scale = *(const vec *)(scales + i / Q8 * W);
      ints even = (ints)(*codes >> 8 * j & 255) - 128, odd = (ints)(*codes >> 8 * (j + 1) & 255) - 128;
      bits lower = rounded(__builtin_convertvector(even, vec) * scale), upper = rounded(__builtin_convertvector(odd, vec) * scale);
      *(bits *)out = lower >> 16 | (upper & 0xffff0000);
    }
  }
}

/* low (count, rows, step) = s·Ax of each part and row. Four ranks are one thread's; the caller waits for all. */
static void lower(const Part *parts, long count, const bf16 *x, float *low, long step, long rows, long inputs) {
  long turn = 0, mine = omp_get_thread_num(), threads = omp_get_num_threads();
  for (long i = 0; i < count * rows; i++) {
    const LowRank *updates = parts[i / rows].updates, *u = updates + i % rows;
    for (long k = 0; updates && k < u->rank; k += 4) {
      if (turn++ % threads != mine) continue;
      float *to = low + i * step + k;
      const word *row = (const word *)(x + i % rows * inputs);
      dots((const char *)(u->A + k * inputs), inputs * sizeof(bf16), 4, row, 1, 0, 1, inputs / 2, to);
      for (int j = 0; j < 4; j++) to[j] *= u->scale;
    }
  }
}

/* A row's 16 outputs of a part from `first` on: y, with bias and with what `lower` has prepared of the row's update */
static inline void finish(const Part *part, long first, long row, const float *low, vec y, bf16 *out) {
  if (part->bias) y += load(part->bias + first);
  if (part->updates) {
    const LowRank *u = part->updates + row;
    const bf16 *B = u->B + first * u->rank;
    for (long k = 0; k < u->rank; k++) y += low[k] * load(B + k * W);
  }
  store(out, y);
}

/* out (rows, Σ outputs) = x Wᵀ + b + s·BAx of parts side by side, for x (rows, inputs). `room` and `low`: of all threads;
   `scratch`: of this one, as is `widened`, which takes the weights of 16 outputs. With it and AMX, q8_0 is widened: for many
   rows twice as fast. */
static void linears(const Part *parts, long count, const bf16 *x, bf16 *out, long rows, long inputs, word *room, float *scratch,
                    word *widened, float *low, long low_step) {
  long words = inputs / 2, columns = rows < W ? rows : W, groups = (rows + columns - 1) / columns, wide = 0;
  int widths[2] = {0}; /* whether there are weights in bf16, and in q8_0 */
  for (long i = 0; i < count; i++) {
    wide += parts[i].outputs;
    widths[0] |= parts[i].weight != 0;
    widths[1] |= parts[i].codes != 0;
  }
  Q8Rows narrow = q8_rows(room + UP(rows, W) * words, rows, inputs);
  lower(parts, count, x, low, low_step, rows, inputs);
  /* each loop ends when all threads have come */
  int widens = widened && tiles && widths[1];
  if (widens)
    pack(x, room, rows, columns = W, words, 0);
  else if (widths[1])
    q8_split(x, narrow, rows * inputs);
  if (widths[0] || !widths[1]) pack(x, room, rows, columns, words, tiles);
  set_tiles(columns);
#pragma omp for schedule(static)
  for (long at = 0; at < wide; at += 2 * W) {
    for (long o = at, next; o < wide && o < at + 2 * W; o = next) {
      const Part *part = parts;
      long first = o;
      for (; first >= part->outputs; part++) first -= part->outputs;
      int high = !part->codes && first + W < part->outputs && o == at ? 2 : 1;
      next = o + high * W;
      const float *own_low = low + (part - parts) * rows * low_step;
      if (part->codes) {
        const bits *codes = part->codes + first * inputs / (4 * W);
        const float *scales = part->scales + first * inputs / Q8;
        if (widens) q8_widen(codes, scales, widened, inputs);
        for (long n = 0; widens && n < rows; n += 2 * W) {
          panel((const bf16 *)room + n * inputs, inputs, rows - n > W ? 2 : 1, widened, W, 1, words, scratch);
          for (long m = n; m < rows && m < n + 2 * W; m++) {
            vec y = *(const vec *)(scratch + (m - n) / W * 2 * TILE + (m - n) % W * W);
            finish(part, first, m, own_low + m * low_step, y, out + m * wide + o);
          }
        }
        for (long n = 0, stop; !widens && n < rows; n = stop) {
          vec y[8];
          int left = rows - n < 8 ? rows - n : 8, many = left == 8 ? 8 : left >= 4 ? 4 : 1;
          stop = n + many;
          if (many == 8) q8_dots(codes, scales, narrow, n, 8, inputs, y);
          if (many == 4) q8_dots(codes, scales, narrow, n, 4, inputs, y);
          if (many == 1) q8_dots(codes, scales, narrow, n, 1, inputs, y);
          for (long m = n; m < stop; m++) finish(part, first, m, own_low + m * low_step, y[m - n], out + m * wide + o);
        }
      } else if (part->weight)
        for (long g = 0; g < groups; g += 2) {
          int pair = g + 1 < groups ? 2 : 1;
          panel(part->weight + first * inputs, inputs, high, room + g * columns * words, columns, pair, words, scratch);
          for (int i = 0; i < high; i++)
            for (int j = 0; j < pair; j++) {
              const float *tile = scratch + (2 * i + j) * TILE;
              long row = (g + j) * columns;
              for (long n = 0; n < columns && row < rows; n++, row++) {
                vec y;
                for (int k = 0; k < W; k++) y[k] = tile[k * columns + n];
                finish(part, first + i * W, row, own_low + row * low_step, y, out + row * wide + o + i * W);
              }
            }
        }
    }
  }
}

/* `room`: see room_of in native.py */
void linear_forward(const bf16 *weight, const bf16 *bias, const bits *codes, const float *scales, const bf16 *x, bf16 *out,
                    word *room, long rows, long inputs, long outputs, long threads) {
  Part part = {weight, bias, outputs, 0, codes, scales};
  long step = 4 * TILE + W * inputs / 2;
  float *scratch = (float *)room;
  room += threads * step;
#pragma omp parallel num_threads(threads)
  {
    float *own = scratch + omp_get_thread_num() * step;
    linears(&part, 1, x, out, rows, inputs, room, own, (word *)(own + 4 * TILE), 0, 0);
    set_tiles(0);
  }
}

typedef struct {
  const bf16 *norm, *feed_norm, *q_norm, *k_norm; /* weights; those of heads may be 0 */
  Part parts[7];                                  /* q, k, v, o, gate, up, down */
  bf16 *keys, *values;                            /* (pages, page, G, K) each */
  float eps, feed_eps, head_eps, scale;
  long window; /* keys that a token sees, its own included */
} LlamaBlock;

typedef struct {
  long rows, D, F, G, R, K, page, pages; /* tokens of a page, and pages of a table */
  long room_step, threads;
  const LlamaBlock *blocks;           /* and one more, of which there is the norm alone */
  const int32_t *tables; const int64_t *lengths;    /* (rows, pages): the sequences' pages; (rows,): tokens in them */
  const bf16 *cos, *sin;              /* (rows, K) */
  bf16 *x, *normed, *qkv, *attended, *projected, *gate_up, *hidden, *down; /* (rows, …) */
  word *packed;                       /* room for a product's x */
  float *room;                        /* of each thread: 4 tiles and the scores of R heads */
  float *low;                         /* (3, rows, low_step), which is the largest rank */
  long low_step;
} LlamaStep;

/* out = rms_norm(x)·weight; `added`, unless 0, is added to x before */
static void norm_rows(const LlamaStep *s, const bf16 *added, const bf16 *weight, float eps) {
#pragma omp for schedule(static)
  for (long n = 0; n < s->rows; n++) {
    bf16 *x = s->x + n * s->D, *out = s->normed + n * s->D;
    vec squares = {0};
    for (long i = 0; i < s->D; i += W) {
      if (added) store(x + i, load(x + i) + load(added + n * s->D + i));
      squares += load(x + i) * load(x + i);
    }
    float r = 1 / sqrtf(fold(squares) / s->D + eps);
    for (long i = 0; i < s->D; i += W) store(out + i, load(x + i) * r * load(weight + i));
  }
}

/* A head's numbers (K,) in fp32, after its norm unless that is 0, turned by its token's angles */
static void turn_head(const bf16 *head, const bf16 *weight, float eps, const bf16 *cos, const bf16 *sin, bf16 *out, long K) {
  vec squares = {0};
  float r = 1;
  if (weight) {
    for (long i = 0; i < K; i += W) squares += load(head + i) * load(head + i);
    r = 1 / sqrtf(fold(squares) / K + eps);
  }
  for (long i = 0; i < K / 2; i += W) {
    vec a = load(head + i), b = load(head + K / 2 + i);
    if (weight) a *= r * load(weight + i), b *= r * load(weight + K / 2 + i);
    store(out + i, a * load(cos + i) - b * load(sin + i));
    store(out + K / 2 + i, b * load(cos + K / 2 + i) + a * load(sin + K / 2 + i));
  }
}

/* out (rows, K) = weights (rows, ·) · values of the keys from `first` to `last` */
static inline __attribute__((always_inline)) void weigh(const LlamaStep *s, const int32_t *table, const bf16 *values,
                                                        const float *weights, long step, const int rows, long first,
                                                        long last, const float *masses, bf16 *out) {
  for (long i = 0; i < s->K; i += W) {
    vec totals[4] = {0};
    for (long t = first; t < last;) {
      const bf16 *value = values + (table[t / s->page] * s->page + t % s->page) * s->G * s->K + i;
      long stop = (t / s->page + 1) * s->page < last ? (t / s->page + 1) * s->page : last;
      for (; t < stop; t++, value += s->G * s->K)
        for (int r = 0; r < rows; r++) totals[r] += weights[r * step + t - first] * load(value);
    }
    for (int r = 0; r < rows; r++) store(out + r * s->K + i, totals[r] * (1 / masses[r]));
  }
}

/* Append the keys and values of group g of token n, and attend */
static void attend_group(const LlamaStep *s, const LlamaBlock *b, long n, long g, float *room) {
  long K = s->K, R = s->R, heads = s->G * R, now = s->lengths[n], seen = now + 1, row = s->G * K;
  const int32_t *table = s->tables + n * s->pages;
  bf16 *qkv = s->qkv + n * (heads + 2 * s->G) * K, *q = qkv + g * R * K, *k = qkv + (heads + g) * K;
  const bf16 *cos = s->cos + n * K, *sin = s->sin + n * K;
  long at = (table[now / s->page] * s->page + now % s->page) * row + g * K;
  turn_head(k, b->k_norm, b->head_eps, cos, sin, b->keys + at, K);
  memcpy(b->values + at, k + row, K * sizeof(bf16));
  bf16 turned[R * K];
  word queries[R * K / 2];
  for (long r = 0; r < R; r++) turn_head(q + r * K, b->q_norm, b->head_eps, cos, sin, turned + r * K, K);
  for (long r = 0; r < R; r++)
    for (long d = 0; d < K / 2; d++) memcpy(queries + (tiles ? d * R + r : r * K / 2 + d), turned + r * K + 2 * d, sizeof(word));
  long first = seen > b->window ? seen - b->window : 0, from = first / W * W, step = UP(seen - from, W);
  float *scores = room + 4 * TILE, masses[R];
  for (long t = from; t < seen; t += W) {
    const bf16 *keys = b->keys + (table[t / s->page] * s->page + t % s->page) * row + g * K;
    panel(keys, row, 1, queries, R, 1, K / 2, room);
    for (long r = 0; r < R; r++)
      for (long j = 0; j < W; j++) {
        int hidden = t + j < first || t + j >= seen;
        scores[r * step + t - from + j] = hidden ? -INFINITY : room[j * R + r] * b->scale;
      }
  }
  for (long r = 0; r < R; r++) {
    float *x = scores + r * step;
    vec top = *(vec *)x, total = {0};
    for (long j = W; j < step; j += W) top = larger(*(vec *)(x + j), top);
    float peak = largest(top);
    for (long j = 0; j < step; j += W) total += *(vec *)(x + j) = exponential(*(vec *)(x + j) - peak);
    masses[r] = sum(total);
  }
  bf16 *out = s->attended + (n * heads + g * R) * K;
  const float *weights = scores + first - from;
  long r = 0;
  for (; r + 4 <= R; r += 4)
    weigh(s, table, b->values + g * K, weights + r * step, step, 4, first, seen, masses + r, out + r * K);
  for (; r < R; r++)
    weigh(s, table, b->values + g * K, weights + r * step, step, 1, first, seen, masses + r, out + r * K);
}

/* Four steps a block, each up to one of its products: of queries, keys and values; out; gate and up; down. After the last
   block one more, which leaves the hidden states in `normed`. From step `first` to `last`. */
void llama_steps(const LlamaStep *s, long first, long last) {
  long heads = s->G * s->R * s->K, F = s->F;
#pragma omp parallel num_threads(s->threads)
  {
    float *room = s->room + omp_get_thread_num() * s->room_step;
    for (long step = first; step < last; step++) {
      const LlamaBlock *b = s->blocks + step / 4;
      const Part *parts = b->parts;
      if (step % 4 == 0) {
        norm_rows(s, step ? s->down : 0, b->norm, b->eps);
        if (parts[0].outputs) linears(parts, 3, s->normed, s->qkv, s->rows, s->D, s->packed, room, 0, s->low, s->low_step);
      } else if (step % 4 == 1) {
        set_tiles(s->R);
#pragma omp for schedule(dynamic) collapse(2)
        for (long n = 0; n < s->rows; n++)
          for (long g = 0; g < s->G; g++) attend_group(s, b, n, g, room);
        linears(parts + 3, 1, s->attended, s->projected, s->rows, heads, s->packed, room, 0, s->low, s->low_step);
      } else if (step % 4 == 2) {
        norm_rows(s, s->projected, b->feed_norm, b->feed_eps);
        linears(parts + 4, 2, s->normed, s->gate_up, s->rows, s->D, s->packed, room, 0, s->low, s->low_step);
      } else {
#pragma omp for schedule(static) collapse(2)
        for (long n = 0; n < s->rows; n++)
          for (long i = 0; i < F; i += W) {
            const bf16 *gate = s->gate_up + n * 2 * F + i;
            vec x = load(gate);
            store(s->hidden + n * F + i, x / (1 + exponential(-x)) * load(gate + F));
          }
        linears(parts + 6, 1, s->hidden, s->down, s->rows, F, s->packed, room, 0, s->low, s->low_step);
      }
    }
    set_tiles(0);
  }
}
