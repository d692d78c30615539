// What is computed row by row: norm, gate, rotation, cross entropy, and the rounding of rows to eight bits.
//
// Everything is computed in float32 and rounded once, but that scale_rows gets what was rounded before. Rows may be any number of elements apart. Sums over rows are made in
// blocks of a fixed number of rows, so that the result does not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "vector_cpu.h"

namespace {

constexpr int64_t BLOCK = 64;

// Calls whole(i) for each full vector of a row of n numbers, and part(i, count) for what is left.
template <typename Whole, typename Part>
inline void along(int64_t n, Whole whole, Part part) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) whole(i);
  if (i < n) part(i, n - i);
}

template <typename T, typename W>
void rms_norm(const T* x, int64_t x_row, const W* weight, T* y, float* rstd, int64_t rows, int64_t width, float eps, float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* in = x + r * x_row;
    T* out = y + r * width;
    Floats squares = all(0.f);
    along(width, [&](int64_t i) { Floats v = load(in + i); squares += v * v; },
          [&](int64_t i, int64_t n) { Floats v = load_some(in + i, n); squares += v * v; });
    float scale = 1.f / std::sqrt(sum(squares) / width + eps);
    rstd[r] = scale;
    if (weight)
      along(width, [&](int64_t i) { store(out + i, load(in + i) * scale * (load(weight + i) + offset)); },
            [&](int64_t i, int64_t n) { store_some(out + i, load_some(in + i, n) * scale * (load_some(weight + i, n) + offset), n); });
    else
      along(width, [&](int64_t i) { store(out + i, load(in + i) * scale); },
            [&](int64_t i, int64_t n) { store_some(out + i, load_some(in + i, n) * scale, n); });
  }
}

// `add` may be null; `sums` is null, or holds one row of `width` for each block of rows.
template <typename T, typename W>
void rms_norm_backward(const T* dy, int64_t dy_row, const T* x, int64_t x_row, const W* weight, const float* rstd, const T* add,
                       int64_t add_row, T* dx, float* sums, int64_t rows, int64_t width, float offset, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < (rows + BLOCK - 1) / BLOCK; b++) {
    float* total = sums ? sums + b * width : nullptr;
    if (total) std::fill(total, total + width, 0.f);
    for (int64_t r = b * BLOCK; r < std::min(rows, (b + 1) * BLOCK); r++) {
      const T *d = dy + r * dy_row, *in = x + r * x_row, *more = add ? add + r * add_row : nullptr;
      T* out = dx + r * width;
      float scale = rstd[r];
      Floats product = all(0.f);
      auto seen = [&](Floats dv, Floats xv, Floats wv) { product += dv * wv * xv * scale; };
      along(width, [&](int64_t i) { seen(load(d + i), load(in + i), weight ? load(weight + i) + offset : all(1.f)); },
            [&](int64_t i, int64_t n) { seen(load_some(d + i, n), load_some(in + i, n), weight ? load_some(weight + i, n) + offset : all(1.f)); });
      float mean = sum(product) / width;
      auto result = [&](Floats dv, Floats xv, Floats wv) { return scale * (dv * wv - xv * scale * mean); };
      along(width,
            [&](int64_t i) {
              Floats dv = load(d + i), xv = load(in + i);
              Floats v = result(dv, xv, weight ? load(weight + i) + offset : all(1.f));
              store(out + i, more ? v + load(more + i) : v);
              if (total) store(total + i, load(total + i) + dv * xv * scale);
            },
            [&](int64_t i, int64_t n) {
              Floats dv = load_some(d + i, n), xv = load_some(in + i, n);
              Floats v = result(dv, xv, weight ? load_some(weight + i, n) + offset : all(1.f));
              store_some(out + i, more ? v + load_some(more + i, n) : v, n);
              if (total) store_some(total + i, load_some(total + i, n) + dv * xv * scale, n);
            });
    }
  }
}

enum Activation { SILU, GELU_TANH, GELU };

struct Act {
  Floats value, slope;
};

inline Act activate(Floats x, int kind) {
  if (kind == SILU) {
    Floats s = 1.f / (1.f + exponential(-x));
    return {x * s, s * (1.f + x * (1.f - s))};
  }
  if (kind == GELU_TANH) {
    Tanh t = hyperbolic_tangent(0.7978845608f * (x + 0.044715f * x * x * x));
    return {0.5f * x * (1.f + t.value), 0.5f * (1.f + t.value) + 0.5f * x * t.slope * 0.7978845608f * (1.f + 0.134145f * x * x)};
  }
  Floats half;
  for (int i = 0; i < WIDTH; i++) half[i] = 0.5f * (1.f + std::erf(x[i] * 0.7071067812f));
  return {x * half, half + x * exponential(-0.5f * x * x) * 0.3989422804f};
}

template <typename T>
void gated(const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* out, int64_t rows, int64_t width, int kind, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T *g = gate + r * gate_row, *u = up + r * up_row;
    T* o = out + r * width;
    along(width, [&](int64_t i) { store(o + i, activate(load(g + i), kind).value * load(u + i)); },
          [&](int64_t i, int64_t n) { store_some(o + i, activate(load_some(g + i, n), kind).value * load_some(u + i, n), n); });
  }
}

template <typename T>
void gated_backward(const T* da, int64_t da_row, const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* dgate, T* dup, T* out,
                    int64_t rows, int64_t width, int kind, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T *d = da + r * da_row, *g = gate + r * gate_row, *u = up + r * up_row;
    T *to_gate = dgate + r * width, *to_up = dup + r * width, *o = out + r * width;
    along(width,
          [&](int64_t i) {
            Floats dv = load(d + i), uv = load(u + i);
            Act act = activate(load(g + i), kind);
            store(to_gate + i, dv * uv * act.slope), store(to_up + i, dv * act.value), store(o + i, act.value * uv);
          },
          [&](int64_t i, int64_t n) {
            Floats dv = load_some(d + i, n), uv = load_some(u + i, n);
            Act act = activate(load_some(g + i, n), kind);
            store_some(to_gate + i, dv * uv * act.slope, n), store_some(to_up + i, dv * act.value, n), store_some(o + i, act.value * uv, n);
          });
  }
}

template <typename T>
inline float one(const T* from) {
  if constexpr (sizeof(T) == 4) return *(const float*)from;
  uint32_t bits = (uint32_t)((const bf16*)from)->bits << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

template <typename T>
inline void put(T* to, float v) {
  store_some(to, all(v), 1);
}

// Heads of a token are `width` apart in the result and head_step apart in x; sign is -1 for the inverse.
template <typename T>
void rope(const T* x, int64_t token_step, int64_t head_step, const float* cosine, const float* sine, T* y, int64_t tokens, int64_t heads,
          int64_t width, int64_t pairs, bool interleaved, float sign, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    const float *c = cosine + t * pairs, *s = sine + t * pairs;
    for (int64_t h = 0; h < heads; h++) {
      const T* in = x + t * token_step + h * head_step;
      T* out = y + (t * heads + h) * width;
      std::memcpy(out + 2 * pairs, in + 2 * pairs, (width - 2 * pairs) * sizeof(T));
      if (interleaved) {
        for (int64_t i = 0; i < pairs; i++) {
          float a = one(in + 2 * i), b = one(in + 2 * i + 1), sv = s[i] * sign;
          put(out + 2 * i, a * c[i] - b * sv), put(out + 2 * i + 1, b * c[i] + a * sv);
        }
        continue;
      }
      along(pairs,
            [&](int64_t i) {
              Floats a = load(in + i), b = load(in + pairs + i), cv = load(c + i), sv = load(s + i) * sign;
              store(out + i, a * cv - b * sv), store(out + pairs + i, b * cv + a * sv);
            },
            [&](int64_t i, int64_t n) {
              Floats a = load_some(in + i, n), b = load_some(in + pairs + i, n), cv = load_some(c + i, n), sv = load_some(s + i, n) * sign;
              store_some(out + i, a * cv - b * sv, n), store_some(out + pairs + i, b * cv + a * sv, n);
            });
    }
  }
}

template <typename T>
void cross_entropy(T* logits, const int64_t* labels, float* loss, int64_t rows, int64_t vocabulary, float scale, float softcap, bool gradient,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    T* row = logits + r * vocabulary;
    if (labels[r] < 0) {
      loss[r] = 0.f;
      if (gradient) std::memset(row, 0, vocabulary * sizeof(T));
      continue;
    }
    auto capped = [&](Floats v) { return softcap ? softcap * hyperbolic_tangent(v * scale / softcap).value : v * scale; };
    Floats most = all(-INFINITY);
    along(vocabulary, [&](int64_t i) { most = larger(capped(load(row + i)), most); },
          [&](int64_t i, int64_t n) { most = larger(capped(load_some(row + i, n, one(row))), most); });
    float top = largest(most);
    // In eight sums, so that a vocabulary of 150,000 does not lose digits.
    Floats sums[8] = {};
    along(vocabulary, [&](int64_t i) { sums[i / WIDTH % 8] += exponential(capped(load(row + i)) - top); },
          [&](int64_t i, int64_t n) {
            Floats v = exponential(capped(load_some(row + i, n)) - top);
            for (int64_t j = 0; j < n; j++) sums[0][j] += v[j];
          });
    float total = 0.f;
    for (Floats& part : sums) total += sum(part);
    float lse = top + std::log(total), picked = capped(all(one(row + labels[r])))[0];
    loss[r] = lse - picked;
    if (!gradient) continue;
    auto grad = [&](Floats v) {
      if (!softcap) return exponential(v * scale - lse) * scale;
      Tanh t = hyperbolic_tangent(v * scale / softcap);
      return exponential(softcap * t.value - lse) * t.slope * scale;
    };
    // In the softmax of the label's own logit 1 is taken away before it is rounded.
    float slope = softcap ? hyperbolic_tangent(all(one(row + labels[r])) * scale / softcap).slope[0] : 1.f;
    float own = (std::exp(picked - lse) - 1.f) * slope * scale;
    along(vocabulary, [&](int64_t i) { store(row + i, grad(load(row + i))); },
          [&](int64_t i, int64_t n) { store_some(row + i, grad(load_some(row + i, n)), n); });
    put(row + labels[r], own);
  }
}

// q = round(x * 127 / max|x|) + 128, and scale = max|x| / 127 for each row.
template <typename T>
void round_rows(const T* x, int64_t x_row, uint8_t* q, float* scales, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const T* in = x + r * x_row;
    uint8_t* out = q + r * width;
    Ints most = {};  // bits of |x|: they rise with the number, and what is no number stands above all
    auto seen = [&](Floats v) {
      Ints size = (Ints)v & 0x7fffffff;
      most = size > most ? size : most;
    };
    along(width, [&](int64_t i) { seen(load(in + i)); }, [&](int64_t i, int64_t n) { seen(load_some(in + i, n)); });
    int32_t bits = 0;
    for (int64_t i = 0; i < WIDTH; i++) bits = std::max(bits, most[i]);
    float top;
    std::memcpy(&top, &bits, sizeof top);
    top = std::max(top, 1e-20f);  // the first if it is no number: then its scale is none, and the row's results are none
    float scale = top / 127.f;
    scales[r] = scale;
    auto rounded_to = [&](Floats v) {
      Ints whole = (Ints)(v * (127.f / top) + 12583040.f);  // 1.5 * 2^23 + 128: rounds, and stands in the lowest bits
      typedef uint8_t Bytes __attribute__((vector_size(16)));
      return __builtin_convertvector(whole & 0xff, Bytes);
    };
    along(width, [&](int64_t i) { auto b = rounded_to(load(in + i)); std::memcpy(out + i, &b, WIDTH); },
          [&](int64_t i, int64_t n) { auto b = rounded_to(load_some(in + i, n)); std::memcpy(out + i, &b, n); });
  }
}

// y = y * scale of its row + add, in place; add may be null.
template <typename T>
void scale_rows(T* y, const float* scales, const T* add, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    T* out = y + r * width;
    const T* more = add ? add + r * width : nullptr;
    float scale = scales[r];
    along(width, [&](int64_t i) { Floats v = load(out + i) * scale; store(out + i, more ? v + load(more + i) : v); },
          [&](int64_t i, int64_t n) {
            Floats v = load_some(out + i, n) * scale;
            store_some(out + i, more ? v + load_some(more + i, n) : v, n);
          });
  }
}

}  // namespace

// One plain C name for each element type: _f for float32, _h for bfloat16; a norm's weight has its own (_ff, _fh, _hf, _hh).
#define NORM(NAME, T, W)                                                                                                               \
  void rms_norm_##NAME(const T* x, int64_t x_row, const W* weight, T* y, float* rstd, int64_t rows, int64_t width, float eps,           \
                       float offset, int threads) {                                                                                    \
    rms_norm(x, x_row, weight, y, rstd, rows, width, eps, offset, threads);                                                            \
  }                                                                                                                                    \
  void rms_norm_backward_##NAME(const T* dy, int64_t dy_row, const T* x, int64_t x_row, const W* weight, const float* rstd,             \
                                const T* add, int64_t add_row, T* dx, float* sums, int64_t rows, int64_t width, float offset,           \
                                int threads) {                                                                                         \
    rms_norm_backward(dy, dy_row, x, x_row, weight, rstd, add, add_row, dx, sums, rows, width, offset, threads);                       \
  }
#define ROWS(NAME, T)                                                                                                                  \
  void gated_##NAME(const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* out, int64_t rows, int64_t width, int64_t kind,    \
                    int threads) {                                                                                                     \
    gated(gate, gate_row, up, up_row, out, rows, width, kind, threads);                                                                \
  }                                                                                                                                    \
  void gated_backward_##NAME(const T* da, int64_t da_row, const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* dgate,       \
                             T* dup, T* out, int64_t rows, int64_t width, int64_t kind, int threads) {                                 \
    gated_backward(da, da_row, gate, gate_row, up, up_row, dgate, dup, out, rows, width, kind, threads);                               \
  }                                                                                                                                    \
  void rope_##NAME(const T* x, int64_t token_step, int64_t head_step, const float* cosine, const float* sine, T* y, int64_t tokens,     \
                   int64_t heads, int64_t width, int64_t pairs, int interleaved, float sign, int threads) {                            \
    rope(x, token_step, head_step, cosine, sine, y, tokens, heads, width, pairs, interleaved != 0, sign, threads);                     \
  }                                                                                                                                    \
  void cross_entropy_##NAME(T* logits, const int64_t* labels, float* loss, int64_t rows, int64_t vocabulary, float scale,               \
                            float softcap, int gradient, int threads) {                                                                \
    cross_entropy(logits, labels, loss, rows, vocabulary, scale, softcap, gradient != 0, threads);                                     \
  }                                                                                                                                    \
  void round_rows_##NAME(const T* x, int64_t x_row, uint8_t* q, float* scales, int64_t rows, int64_t width, int threads) {             \
    round_rows(x, x_row, q, scales, rows, width, threads);                                                                             \
  }                                                                                                                                    \
  void scale_rows_##NAME(T* y, const float* scales, const T* add, int64_t rows, int64_t width, int threads) {                          \
    scale_rows(y, scales, add, rows, width, threads);                                                                                  \
  }

extern "C" {
NORM(ff, float, float)
NORM(fh, float, bf16)
NORM(hf, bf16, float)
NORM(hh, bf16, bf16)
ROWS(f, float)
ROWS(h, bf16)
}
