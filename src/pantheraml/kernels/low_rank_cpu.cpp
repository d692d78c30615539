// What a low-rank addition to a layer does with the layer's results: scale * low * b^T is added to them, and from their gradient
// come those of low and b in one pass. The number of outputs is a multiple of 16; rows of y, grad and low may be any number of
// elements apart.
//
// Sums over rows are made in parts that depend on the number of rows alone, so that the number of threads changes no bit.
#include <algorithm>
#include <memory>
#include <vector>

#include "product_cpu.h"

namespace {

constexpr int64_t ROWS = 256, COLUMNS = 128;  // of a piece of the gradient, which stays in cache while it is used twice
constexpr int64_t FEW = 32;                   // rows of a piece of results
constexpr int64_t MANY = 1 << 20;             // numbers that threads add up together; with fewer they would be woken for nothing

// A piece of a matrix as the products take it: the matrix itself, or a copy in another dtype, whose distance of rows is put in from_row.
template <typename E, typename T>
inline const E* staged(const T* from, int64_t& from_row, int64_t rows, int64_t columns, E* room) {
  if constexpr (std::is_same_v<E, T>) {
    return from;
  } else {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) assign(room[r * columns + c], value(from[r * from_row + c]));
    from_row = columns;
    return room;
  }
}

// Rows o to o + WIDTH of b, column r; 0 beyond the rank.
template <typename B>
inline Floats column(const B* b, int64_t rank, int64_t o, int64_t r) {
  Floats v{};
  if (r < rank)
    for (int64_t i = 0; i < WIDTH; i++) v[i] = value(b[(o + i) * rank + r]);
  return v;
}

// y += scale * low * b^T. y: [rows][outputs], low: [rows][rank], b: [outputs][rank].
template <typename P, typename T, typename B>
void low_rank_add(T* y, int64_t y_row, const T* low, int64_t low_row, const B* b, int64_t rows, int64_t outputs, int64_t rank, float scale,
                  int threads) {
  using E = typename P::E;
  int64_t inner = round_up(rank, 2);
  std::unique_ptr<E[]> wide(new E[inner * outputs]);  // [inner / PAIR][outputs][PAIR]
  for (int64_t o = 0; o < outputs; o += WIDTH)
    for (int64_t r = 0; r < inner; r += 2) put_rows(wide.get(), r, outputs, o, column(b, rank, o, r), column(b, rank, o, r + 1));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < rows; n += FEW) {
    int64_t count = std::min(FEW, rows - n);
    std::vector<E> left(FEW * inner);
    for (int64_t i = 0; i < count; i++)
      for (int64_t r = 0; r < rank; r++) assign(left[i * inner + r], low[(n + i) * low_row + r]);
    T* piece = y + n * y_row;
    auto add = [=](int64_t i, int64_t o, Floats sum) __attribute__((always_inline)) {
      T* to = piece + i * y_row + o;
      store(to, load(to) + scale * sum);
    };
    product<P>(left.data(), inner, wide.get(), outputs, count, outputs, inner, add);
  }
}

// grad_low = scale * grad * b and grad_b = scale * grad^T * low. sums: room for [padded][outputs] of each part of part_rows rows.
template <typename P, typename T, typename B>
void low_rank_backward(const T* grad, int64_t grad_row, const B* b, const T* low, int64_t low_row, B* grad_b, T* grad_low, float* sums,
                       int64_t part_rows, int64_t rows, int64_t outputs, int64_t rank, float scale, int threads) {
  using E = typename P::E;
  int64_t padded = round_up(rank, WIDTH), parts = (rows + part_rows - 1) / part_rows;
  std::unique_ptr<E[]> narrow(new E[outputs * padded]);  // [outputs / PAIR][padded][PAIR]
  for (int64_t o = 0; o < outputs; o += 2)
    for (int64_t r = 0; r < padded; r += WIDTH) {
      const B* from = b + o * rank + r;
      if (r + WIDTH <= rank)
        put_rows(narrow.get(), o, padded, r, load(from), load(from + rank));
      else
        put_rows(narrow.get(), o, padded, r, load_some(from, rank - r), load_some(from + rank, rank - r));
    }
#pragma omp parallel num_threads(threads)
  {
    std::vector<E> room(std::is_same_v<E, T> ? 0 : ROWS * COLUMNS), pairs(ROWS * COLUMNS), left(padded * ROWS);
    std::vector<float> found(ROWS * padded);
    std::vector<const E*> at(ROWS);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < parts; part++)
      for (int64_t first = part * part_rows; first < std::min(rows, (part + 1) * part_rows); first += ROWS) {
        int64_t count = std::min(ROWS, rows - first), even = round_up(count, P::PAIR);
        for (int64_t i = 0; i < even; i++)
          for (int64_t r = 0; r < rank; r++)
            if (i < count)
              assign(left[r * ROWS + i], low[(first + i) * low_row + r]);
            else
              assign(left[r * ROWS + i], 0.f);
        for (int64_t c = 0; c < outputs; c += COLUMNS) {
          int64_t columns = std::min(COLUMNS, outputs - c), step = grad_row;
          const E* piece = staged<E>(grad + first * grad_row + c, step, count, columns, room.data());
          product<P>(piece, step, narrow.get() + c * padded, padded, found.data(), padded, count, padded, columns, c > 0);
          for (int64_t i = 0; i < count; i++) at[i] = piece + i * step;
          paired<P>(at.data(), count, even, columns, pairs.data());
          product<P>(left.data(), ROWS, pairs.data(), columns, sums + part * padded * outputs + c, outputs, padded, columns, even,
                     first > part * part_rows);
        }
        for (int64_t i = 0; i < count; i++)
          for (int64_t r = 0; r < rank; r += WIDTH) {
            T* to = grad_low + (first + i) * rank + r;
            Floats v = scale * load(&found[i * padded + r]);
            if (r + WIDTH <= rank)
              store(to, v);
            else
              store_some(to, v, rank - r);
          }
      }
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (parts * padded * outputs > MANY)
  for (int64_t o = 0; o < outputs; o += WIDTH)
    for (int64_t r = 0; r < rank; r++) {
      Floats total = all(0.f);
      for (int64_t part = 0; part < parts; part++) total += load(sums + (part * padded + r) * outputs + o);
      total *= scale;
      for (int64_t i = 0; i < WIDTH; i++) assign(grad_b[(o + i) * rank + r], total[i]);
    }
}

}  // namespace

// The first letter is the dtype of rows, the second that of b.
#define LOW_RANK(NAME, P, T, B)                                                                                                        \
  void low_rank_add_##NAME(T* y, int64_t y_row, const T* low, int64_t low_row, const B* b, int64_t rows, int64_t outputs, int64_t rank, \
                           float scale, int threads) {                                                                                 \
    low_rank_add<P>(y, y_row, low, low_row, b, rows, outputs, rank, scale, threads);                                                   \
  }                                                                                                                                    \
  void low_rank_backward_##NAME(const T* grad, int64_t grad_row, const B* b, const T* low, int64_t low_row, B* grad_b, T* grad_low,    \
                                float* sums, int64_t part_rows, int64_t rows, int64_t outputs, int64_t rank, float scale,              \
                                int threads) {                                                                                         \
    low_rank_backward<P>(grad, grad_row, b, low, low_row, grad_b, grad_low, sums, part_rows, rows, outputs, rank, scale, threads);     \
  }

extern "C" {
LOW_RANK(ff, Single, float, float)
LOW_RANK(hf, ForHalves, bf16, float)
LOW_RANK(hh, ForHalves, bf16, bf16)
}
