// Sixteen numbers at once, in whatever registers the compiler's target has, and bfloat16 in memory.
//
// Vectors are those of GCC and Clang, so the same lines become AVX-512, two AVX2 halves or four NEON quarters.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int64_t WIDTH = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};

inline Floats all(float value) { return Floats{} + value; }

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats load(const bf16* from) {
  Halves half;
  std::memcpy(&half, from, sizeof half);
  return (Floats)(__builtin_convertvector(half, Words) << 16);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// To the nearest, ties to even, as torch rounds; what is no number stays none.
inline Halves rounded(Floats v) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  Words bits = (Words)v;
  Words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  near = v == v ? near : (bits >> 16) | 0x40;
  return __builtin_convertvector(near, Halves);
#endif
}

inline void store(bf16* to, Floats v) {
  Halves half = rounded(v);
  std::memcpy(to, &half, sizeof half);
}

// The last `count` < WIDTH numbers of a row: `fill` stands for those that are not there.
template <typename T>
inline Floats load_some(const T* from, int64_t count, float fill = 0.f) {
  T some[WIDTH];
  store(some, all(fill));
  std::memcpy(some, from, count * sizeof(T));
  return load(some);
}

template <typename T>
inline void store_some(T* to, Floats v, int64_t count) {
  T some[WIDTH];
  store(some, v);
  std::memcpy(to, some, count * sizeof(T));
}

inline float sum(Floats v) {
  float total = 0.f;
  for (int i = 0; i < WIDTH; i++) total += v[i];
  return total;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats v) {
  float most = v[0];
  for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
  return most;
}

// e^x to about one unit in the last place: x = n ln 2 + f, a polynomial for e^f, and n into the exponent.
// Below -87 it is 0; above 88 it is infinite. What is no number stays none.
inline Floats exponential(Floats x) {
  Floats clipped = x < -87.3f ? all(-87.3f) : x;
  clipped = clipped > 88.f ? all(88.f) : clipped;
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  Floats shifted = clipped * 1.44269504f + 12582912.f;
  Ints n = (Ints)shifted - (Ints)all(12582912.f);
  Floats whole = shifted - 12582912.f;
  Floats f = clipped - whole * 0.693359375f;
  f = f - whole * -2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.f;
  Floats result = (Floats)((Ints)p + (n << 23));
  result = x < -87.3f ? all(0.f) : result;
  result = x > 88.f ? all(INFINITY) : result;
  return x == x ? result : x;
}

struct Tanh {
  Floats value, slope;
};

// tanh|x| = 1 - 2 / (e^2|x| + 1), its slope 4 e^2|x| / (e^2|x| + 1)^2; for small |x| the first would lose digits, so the odd series.
inline Tanh hyperbolic_tangent(Floats x) {
  Floats size = x < 0.f ? -x : x;
  Floats e = exponential(2.f * (size > 43.f ? all(43.f) : size));
  Floats far = 1.f - 2.f / (e + 1.f), falling = 4.f / (e + 1.f) * (e / (e + 1.f));
  Floats s = x * x;
  Floats near = size * (1.f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * (0.0218694885f - s * 0.0088632355f)))));
  Floats t = size < 0.3f ? near : far;
  Floats slope = size < 0.3f ? 1.f - near * near : falling;
  t = x < 0.f ? -t : t;
  return {x == x ? t : x, x == x ? slope : x};
}
