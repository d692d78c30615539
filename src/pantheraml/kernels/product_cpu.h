// Small products of matrices whose second factor is laid out for them, and the ways to lay it out.
//
// On a CPU with AVX512-BF16 bfloat16 products are taken two at a time with sums in float32; elsewhere, and in float32, they are
// float32 products.
#pragma once
#include <type_traits>

#include "vector_cpu.h"

namespace {

#ifdef __AVX512F__
constexpr int TALL = 6, WIDE = 4;  // 24 of 32 registers hold sums
#else
constexpr int TALL = 4, WIDE = 1;
#endif

// How numbers are multiplied. E: element in the buffers; PAIR: elements of the inner dimension that stand side by side.
struct Single {
  using E = float;
  static constexpr int PAIR = 1;
  using Row = Floats;
  static Floats row(const E* b) { return load(b); }
  static Floats many(const E* a) { return all(*a); }
  static Floats multiply(Floats sum, Floats a, Floats b) { return sum + a * b; }
};

#ifdef __AVX512BF16__
struct Pairs {
  using E = bf16;
  static constexpr int PAIR = 2;
  using Row = __m512bh;
  static Row row(const E* b) { return (Row)_mm512_loadu_si512(b); }
  static Row many(const E* a) {
    int both;
    std::memcpy(&both, a, 4);
    return (Row)_mm512_set1_epi32(both);
  }
  static Floats multiply(Floats sum, Row a, Row b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

#ifdef __AVX512BF16__
using ForHalves = Pairs;
#else
using ForHalves = Single;
#endif

// The sum at row i and columns j to j + WIDTH is handed to finish(i, j, sum).
template <typename P, int M, int N, typename Finish>
inline __attribute__((always_inline)) void tile(const typename P::E* a, int64_t a_row, const typename P::E* b, int64_t b_row, int64_t inner,
                                               Finish finish) {
  Floats sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sums[i][j] = all(0.f);
  for (int64_t k = 0; k < inner; k++) {
    typename P::Row rows[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) rows[j] = P::row(b + (k * b_row + j * WIDTH) * P::PAIR);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      auto left = P::many(a + i * a_row + k * P::PAIR);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sums[i][j] = P::multiply(sums[i][j], left, rows[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) finish(i, j * WIDTH, sums[i][j]);
}

template <typename P, int N, typename Finish>
inline void strip(const typename P::E* a, int64_t a_row, const typename P::E* b, int64_t b_row, int64_t m, int64_t inner, Finish finish) {
  auto below = [&](int64_t i) {
    return [=](int64_t x, int64_t y, Floats sum) __attribute__((always_inline)) { finish(i + x, y, sum); };
  };
  int64_t i = 0;
  for (; i + TALL <= m; i += TALL) tile<P, TALL, N>(a + i * a_row, a_row, b, b_row, inner, below(i));
  for (; i + 4 <= m; i += 4) tile<P, 4, N>(a + i * a_row, a_row, b, b_row, inner, below(i));
  for (; i < m; i++) tile<P, 1, N>(a + i * a_row, a_row, b, b_row, inner, below(i));
}

// a: [m][k], rows a_row apart. b: [k / PAIR][b_row][PAIR]. n is a multiple of WIDTH, k of PAIR.
template <typename P, typename Finish>
void product(const typename P::E* a, int64_t a_row, const typename P::E* b, int64_t b_row, int64_t m, int64_t n, int64_t k, Finish finish) {
  auto beside = [&](int64_t j) {
    return [=](int64_t x, int64_t y, Floats sum) __attribute__((always_inline)) { finish(x, j + y, sum); };
  };
  int64_t j = 0, inner = k / P::PAIR;
  for (; j + WIDE * WIDTH <= n; j += WIDE * WIDTH) strip<P, WIDE>(a, a_row, b + j * P::PAIR, b_row, m, inner, beside(j));
  for (; WIDE > 2 && j + 2 * WIDTH <= n; j += 2 * WIDTH) strip<P, 2>(a, a_row, b + j * P::PAIR, b_row, m, inner, beside(j));
  for (; j < n; j += WIDTH) strip<P, 1>(a, a_row, b + j * P::PAIR, b_row, m, inner, beside(j));
}

// The product is written to c, or added: then each block's own sum is added, which errs less than one long sum.
template <typename P>
void product(const typename P::E* a, int64_t a_row, const typename P::E* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t n,
             int64_t k, bool add) {
  product<P>(a, a_row, b, b_row, m, n, k, [=](int64_t i, int64_t j, Floats sum) __attribute__((always_inline)) {
    float* to = c + i * c_row + j;
    store(to, add ? load(to) + sum : sum);
  });
}

inline float value(float v) { return v; }
inline float value(bf16 v) {
  uint32_t bits = (uint32_t)v.bits << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void assign(float& to, float v) { to = v; }
inline void assign(bf16& to, float v) {
  Halves half = rounded(all(v));
  to.bits = half[0];
}
inline void assign(bf16& to, bf16 v) { to = v; }
inline void assign(float& to, bf16 v) { to = value(v); }

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// [rows][width] -> [width / PAIR][padded][PAIR]: what multiplies rows of another matrix by these rows.
template <typename P, typename T>
void turned(const T* const* rows, int64_t count, int64_t padded, int64_t width, typename P::E* out) {
  if constexpr (std::is_same_v<T, typename P::E>) {  // whole pairs, in pieces that stay close
    constexpr int64_t BYTES = P::PAIR * sizeof(T);
    for (int64_t r = 0; r < padded; r += WIDTH)
      for (int64_t d = 0; d < width; d += P::PAIR)
        for (int64_t x = r; x < r + WIDTH; x++)
          if (x < count)
            std::memcpy(out + d * padded + x * P::PAIR, rows[x] + d, BYTES);
          else
            std::memset(out + d * padded + x * P::PAIR, 0, BYTES);
    return;
  }
  for (int64_t r = 0; r < padded; r++)
    for (int64_t d = 0; d < width; d++) {
      typename P::E& to = out[(d / P::PAIR * padded + r) * P::PAIR + d % P::PAIR];
      if (r < count)
        assign(to, rows[r][d]);
      else
        assign(to, 0.f);
    }
}

// [rows][width] -> [padded / PAIR][width][PAIR]: what is summed over these rows.
template <typename P, typename T>
void paired(const T* const* rows, int64_t count, int64_t padded, int64_t width, typename P::E* out) {
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<T, typename P::E>) {
    for (int64_t r = 0; r < padded; r += 2)
      for (int64_t d = 0; d < width; d += WIDTH) {
        Halves low{}, high{};
        if (r < count) std::memcpy(&low, rows[r] + d, sizeof low);
        if (r + 1 < count) std::memcpy(&high, rows[r + 1] + d, sizeof high);
        Words both = __builtin_convertvector(low, Words) | (__builtin_convertvector(high, Words) << 16);
        std::memcpy(out + r * width + d * 2, &both, sizeof both);
      }
    return;
  }
  for (int64_t r = 0; r < padded; r++)
    for (int64_t d = 0; d < width; d++) {
      typename P::E& to = out[(r / P::PAIR * width + d) * P::PAIR + r % P::PAIR];
      if (r < count)
        assign(to, rows[r][d]);
      else
        assign(to, 0.f);
    }
}

// Rows x and x + 1 of a matrix [][padded], at column c, as a sum over its rows takes them; x is even.
inline void put_rows(float* out, int64_t x, int64_t padded, int64_t c, Floats a, Floats b) {
  store(out + x * padded + c, a);
  store(out + (x + 1) * padded + c, b);
}
inline void put_rows(bf16* out, int64_t x, int64_t padded, int64_t c, Floats a, Floats b) {
  Words low = __builtin_convertvector(rounded(a), Words), high = __builtin_convertvector(rounded(b), Words);
  Words both = low | (high << 16);
  std::memcpy(out + (x / 2 * padded + c) * 2, &both, sizeof both);
}

}  // namespace
