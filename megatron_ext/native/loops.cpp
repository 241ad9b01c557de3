// Row-wise steps of a training step on a CPU, each in one pass: see loops.py for what they mean.
//
// A number is read as float, everything is computed in float, and rounded once when it is written
// (bf16: to nearest, ties to even). What a row becomes depends on that row only, and sums over rows
// run over blocks of fixed length: the result does not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>

typedef int64_t i64;

struct bf16 {
  uint16_t bits;
};

static inline float get(const float* p) { return *p; }

static inline float get(const bf16* p) {
  uint32_t wide = (uint32_t)p->bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

static inline void put(float* p, float value) { *p = value; }

static inline void put(bf16* p, float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  p->bits = value != value ? 0x7fc0 : (uint16_t)rounded;
}

// exp to about 1e-7 of its value, without branches and calls so that loops stay vectors: 2^n times a
// polynomial of the rest (Cephes). Beyond the range of normal floats the value at its end; NaN stays.
static inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = __builtin_rintf(x * 1.44269504f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t power = (uint32_t)((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  return p * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// Numbers from which on a second thread is worth its start.
static const i64 WORTH_THREADS = 1 << 13;

// --- RMSNorm ------------------------------------------------------------------------------------

template <class T>
static void rms_norm(const T* x, const T* weight, T* y, float* per_rms, i64 rows, i64 width,
                     float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > WORTH_THREADS)
  for (i64 i = 0; i < rows; i++) {
    const T* in = x + i * width;
    T* out = y + i * width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (i64 j = 0; j < width; j++) squares += get(in + j) * get(in + j);
    float r = 1.0f / sqrtf(squares / width + eps);
    per_rms[i] = r;
#pragma omp simd
    for (i64 j = 0; j < width; j++) put(out + j, get(in + j) * r * get(weight + j));
  }
}

// `sums` [blocks of 64 rows, width]: the gradient of the weight, block by block.
template <class T>
static void rms_norm_backward(const T* grad, const T* x, const T* weight, const float* per_rms,
                              T* dx, float* sums, i64 rows, i64 width, int threads) {
  const i64 length = 64, blocks = (rows + length - 1) / length;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > WORTH_THREADS)
  for (i64 b = 0; b < blocks; b++) {
    float* sum = sums + b * width;
    memset(sum, 0, width * sizeof(float));
    i64 end = rows < (b + 1) * length ? rows : (b + 1) * length;
    for (i64 i = b * length; i < end; i++) {
      const T *g = grad + i * width, *in = x + i * width;
      T* out = dx + i * width;
      float r = per_rms[i], pull = 0;
#pragma omp simd reduction(+ : pull)
      for (i64 j = 0; j < width; j++) {
        float product = get(g + j) * r * get(in + j);
        sum[j] += product;
        pull += product * get(weight + j);
      }
      pull *= -r * r / width;
#pragma omp simd
      for (i64 j = 0; j < width; j++)
        put(out + j, get(g + j) * r * get(weight + j) + get(in + j) * pull);
    }
  }
}

// --- SwiGLU -------------------------------------------------------------------------------------

template <class T>
static void swiglu(const T* hidden, T* act, i64 rows, i64 width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > WORTH_THREADS)
  for (i64 i = 0; i < rows; i++) {
    const T *gate = hidden + 2 * width * i, *up = gate + width;
    T* out = act + width * i;
#pragma omp simd
    for (i64 j = 0; j < width; j++) {
      float x = get(gate + j);
      put(out + j, x * sigmoid(x) * get(up + j));
    }
  }
}

template <class T>
static void swiglu_backward(const T* grad, const T* hidden, T* dhidden, T* act, i64 rows, i64 width,
                            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > WORTH_THREADS)
  for (i64 i = 0; i < rows; i++) {
    const T *gate = hidden + 2 * width * i, *up = gate + width, *g = grad + width * i;
    T *dgate = dhidden + 2 * width * i, *dup = dgate + width, *out = act + width * i;
#pragma omp simd
    for (i64 j = 0; j < width; j++) {
      float x = get(gate + j), u = get(up + j), d = get(g + j), s = sigmoid(x);
      put(out + j, x * s * u);
      put(dup + j, d * x * s);
      put(dgate + j, d * u * s * (1.0f + x * (1.0f - s)));
    }
  }
}

// --- Softmax ------------------------------------------------------------------------------------

// The first `width` numbers of a row become their softmax; -> largest number, log of the sum.
template <class T>
static inline void softmax_row(T* row, i64 width, float* work, float* peak, float* rest) {
  float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
  for (i64 j = 0; j < width; j++) {
    float x = get(row + j);
    work[j] = x;
    most = x > most ? x : most;
  }
#pragma omp simd reduction(+ : sum)
  for (i64 j = 0; j < width; j++) {
    float e = exp_of(work[j] - most);
    work[j] = e;
    sum += e;
  }
  float share = 1.0f / sum;
#pragma omp simd
  for (i64 j = 0; j < width; j++) put(row + j, work[j] * share);
  *peak = most;
  *rest = logf(sum);
}

// `work` [threads, true_width]; columns from true_width on become 0.
template <class T>
static void softmax_statistics(T* logits, const i64* place, float* work, float* peak, float* rest,
                               float* label, i64 rows, i64 width, i64 true_width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 t = 0; t < threads; t++) {
    for (i64 i = rows * t / threads; i < rows * (t + 1) / threads; i++) {
      T* row = logits + i * width;
      label[i] = get(row + place[i]);
      softmax_row(row, true_width, work + t * true_width, peak + i, rest + i);
      memset((void*)(row + true_width), 0, (width - true_width) * sizeof(T));
    }
  }
}

// Row i of a head stands at position first + i / together and sees the keys up to its own.
template <class T>
static void causal_softmax(T* scores, float* work, i64 heads, i64 rows, i64 keys, i64 first,
                           i64 together, int threads) {
  const i64 all = heads * rows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 t = 0; t < threads; t++) {
    for (i64 i = all * t / threads; i < all * (t + 1) / threads; i++) {
      T* row = scores + i * keys;
      i64 seen = first + i % rows / together + 1;
      float peak, rest;
      softmax_row(row, seen, work + t * keys, &peak, &rest);
      memset((void*)(row + seen), 0, (keys - seen) * sizeof(T));
    }
  }
}

// --- Rotary embedding ---------------------------------------------------------------------------

// x, out [m, s, h, d] with strides (in numbers) of the first three; cos, sin [s, half].
template <class T>
static void rotate_halves(const T* x, T* out, const T* cos, const T* sin, i64 m, i64 s, i64 h,
                          i64 d, i64 half, float scale, float sign, i64 xm, i64 xs, i64 xh, i64 om,
                          i64 os, i64 oh, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (m * s * h * d > WORTH_THREADS)
  for (i64 a = 0; a < m; a++) {
    for (i64 b = 0; b < s; b++) {
      const T *c = cos + b * half, *n = sin + b * half;
      for (i64 k = 0; k < h; k++) {
        const T* in = x + a * xm + b * xs + k * xh;
        T* to = out + a * om + b * os + k * oh;
#pragma omp simd
        for (i64 j = 0; j < half; j++) {
          float u = get(in + j), v = get(in + half + j), turn = sign * get(n + j);
          put(to + j, u * get(c + j) - v * turn);
          put(to + half + j, v * get(c + j) + u * turn);
        }
#pragma omp simd
        for (i64 j = 2 * half; j < d; j++) put(to + j, get(in + j) * scale);
      }
    }
  }
}

// --- Rows of experts ----------------------------------------------------------------------------

// The assignments of token t are starts[t] up to starts[t + 1]; `weights` may be null (all 1).
static inline i64 end_of(const i64* starts, i64 token, i64 tokens, i64 assignments) {
  return token + 1 < tokens ? starts[token + 1] : assignments;
}

// `work` [threads, width].
template <class T>
static void collect(const T* rows, const i64* places, const i64* starts, const float* weights,
                    float* work, T* out, i64 tokens, i64 assignments, i64 width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 part = 0; part < threads; part++) {
    float* sum = work + part * width;
    for (i64 t = tokens * part / threads; t < tokens * (part + 1) / threads; t++) {
      memset(sum, 0, width * sizeof(float));
      for (i64 a = starts[t]; a < end_of(starts, t, tokens, assignments); a++) {
        const T* row = rows + places[a] * width;
        float weight = weights ? weights[a] : 1.0f;
#pragma omp simd
        for (i64 j = 0; j < width; j++) sum[j] += weight * get(row + j);
      }
#pragma omp simd
      for (i64 j = 0; j < width; j++) put(out + t * width + j, sum[j]);
    }
  }
}

template <class T>
static void collect_backward(const T* grad, const T* rows, const i64* places, const i64* starts,
                             const float* weights, T* drows, float* dweights, i64 tokens,
                             i64 assignments, i64 width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * width > WORTH_THREADS)
  for (i64 t = 0; t < tokens; t++) {
    const T* g = grad + t * width;
    for (i64 a = starts[t]; a < end_of(starts, t, tokens, assignments); a++) {
      const T* row = rows + places[a] * width;
      T* to = drows + places[a] * width;
      float weight = weights[a], dot = 0;
#pragma omp simd reduction(+ : dot)
      for (i64 j = 0; j < width; j++) {
        float x = get(g + j);
        dot += x * get(row + j);
        put(to + j, weight * x);
      }
      dweights[a] = dot;
    }
  }
}

// --- Names for ctypes: each a pointer to the loop of one type -------------------------------------

#define NAMED(loop)                \
  auto* loop##_f32 = &loop<float>; \
  auto* loop##_bf16 = &loop<bf16>;

extern "C" {
NAMED(rms_norm)
NAMED(rms_norm_backward)
NAMED(swiglu)
NAMED(swiglu_backward)
NAMED(softmax_statistics)
NAMED(causal_softmax)
NAMED(collect)
NAMED(collect_backward)
NAMED(rotate_halves)
}
