// Causal attention over packed examples in blocks: a running softmax forward, the weights computed once more backward.
//
// Scores stand transposed, keys by queries, so that the softmax of a query runs down a column: it needs no sum across a vector,
// and all seven products have one form, C[M x N] (+)= A[M x K] * B, with B laid out for it. The queries that share a key head are
// rows of one block.
#include <algorithm>
#include <vector>

#include "product_cpu.h"

namespace {

constexpr int64_t KEYS = 64;  // keys of a block
constexpr int64_t QUERIES = 32;  // tokens of a block of queries, each with all the heads that share a key head
struct Shape {
  int64_t tokens, heads, keys, width;  // of q, k and v
  int64_t window;                      // 0: none
  float scale, softcap;                // softcap 0: none
};

template <typename T>
struct Matrix {  // [tokens][heads][width], any distance between tokens and heads
  T* at_first;
  int64_t token, head;
  T* at(int64_t t, int64_t h) const { return at_first + t * token + h * head; }
};

// What one thread does at a time: queries [from, to) of an example and a key head, or all that see keys [from, to), or both.
struct Task {
  int64_t start, length, key, from, to;
  bool queries, keys;
  double work;  // pairs of tokens
};

// Pairs of a query and a key that it sees.
inline double pairs_of(int64_t length, int64_t window) {
  double seen = window ? std::min(length, window) : length;
  return seen * length - seen * seen / 2;
}

// Where a part of an example of so many tokens ends, so that all parts are about as much work: a query sees the keys before it, or
// nearly always a whole window of them.
inline int64_t cut(int64_t length, int64_t window, int64_t part, int64_t parts, bool by_keys) {
  if (part == parts) return length;
  double share = (double)part / parts;
  if (!window || 2 * window > length) share = by_keys ? 1 - std::sqrt(1 - share) : std::sqrt(share);
  return std::min(length, round_up((int64_t)(share * length), KEYS));
}

// The tasks, most work first. One for each example and key head, unless threads would wait for each other: then those that are too
// long are cut. Each number is summed in the same order either way.
std::vector<Task> tasks_of(const int32_t* starts, int64_t examples, const Shape& shape, int threads, bool backward) {
  std::vector<Task> whole;
  double total = 0;
  for (int64_t s = 0; s < examples; s++) {
    int64_t length = starts[s + 1] - starts[s];
    double work = pairs_of(length, shape.window);
    for (int64_t h = 0; h < shape.keys && length; h++) whole.push_back({starts[s], length, h, 0, length, true, backward, work});
    total += shape.keys * work;
  }
  auto most_first = [](std::vector<Task>& tasks) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  };
  most_first(whole);
  std::vector<double> busy(threads, 0.);
  for (const Task& task : whole) *std::min_element(busy.begin(), busy.end()) += task.work;
  // A cut task computes seven products instead of five in backward.
  double fair = total / threads, cost = backward ? 7. / 5 : 1;
  if (*std::max_element(busy.begin(), busy.end()) <= 1.1 * cost * fair) return whole;
  std::vector<Task> tasks;
  for (const Task& task : whole) {
    int64_t parts = std::min((int64_t)std::ceil(4 * task.work / fair), round_up(task.length, KEYS) / KEYS);
    if (task.work <= fair / 2 || parts < 2) {
      tasks.push_back(task);
      continue;
    }
    for (int64_t part = 0; part < parts; part++)
      for (bool by_keys : {false, true}) {
        int64_t from = cut(task.length, shape.window, part, parts, by_keys), to = cut(task.length, shape.window, part + 1, parts, by_keys);
        if (from < to && (backward || !by_keys)) tasks.push_back({task.start, task.length, task.key, from, to, !by_keys, by_keys, task.work / parts});
      }
  }
  most_first(tasks);
  return tasks;
}

// The first block of keys that a block of queries starting at i can see.
inline int64_t first_key(const Shape& s, int64_t i) { return s.window ? std::max<int64_t>(0, i - s.window + 1) / KEYS * KEYS : 0; }

// The queries of one block: position of each row in its example.
struct Block {
  int64_t tokens, rows, padded;
  std::vector<int32_t> position;

  void open(int64_t i, int64_t length, int64_t groups) {
    tokens = std::min(QUERIES, length - i), rows = tokens * groups, padded = round_up(rows, WIDTH);
    position.assign(padded, -1);
    for (int64_t r = 0; r < rows; r++) position[r] = i + r / groups;
  }
};

inline bool differs(Floats v, float from) {
  Ints other = v != from;
  for (int i = 1; i < WIDTH; i++) other[0] |= other[i];
  return other[0] != 0;
}

inline Ints load_ints(const int32_t* from) {
  Ints v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Which of sixteen queries do not see a key.
inline Ints hidden(const Shape& s, Ints position, int64_t key) {
  Ints behind = position - (int32_t)key;
  Ints no = behind < 0;
  if (s.window) no |= behind >= (int32_t)s.window;
  return no;
}

template <typename P, typename T>
void forward(Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, T* out, float* lse, const int32_t* starts, int64_t examples, Shape s,
             int threads) {
  using E = typename P::E;
  std::vector<Task> tasks = tasks_of(starts, examples, s, threads, false);
  int64_t groups = s.heads / s.keys, D = s.width;
#pragma omp parallel num_threads(threads)
  {
    std::vector<E> keys, values, queries, weights;
    std::vector<float> scores, result, most, total;
    std::vector<const T*> rows;
    Block block;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < (int64_t)tasks.size(); task++) {
      const auto& [start, length, key, from, to, is_queries, is_keys, work] = tasks[task];
      int64_t first = first_key(s, from), padded = round_up(to - first, KEYS);
      keys.resize((to - first) * D), values.assign(D * padded, E{});
      for (int64_t j = first; j < to; j++)
        for (int64_t d = 0; d < D; d++) {
          assign(keys[(j - first) * D + d], k.at(start + j, key)[d]);
          assign(values[d * padded + j - first], v.at(start + j, key)[d]);
        }
      for (int64_t i = from; i < to; i += QUERIES) {
        block.open(i, length, groups);
        int64_t R = block.padded;
        rows.resize(block.rows);
        for (int64_t r = 0; r < block.rows; r++) rows[r] = q.at(start + i + r / groups, key * groups + r % groups);
        queries.resize(D * R), turned<P>(rows.data(), block.rows, R, D, queries.data());
        scores.resize(KEYS * R), weights.resize(KEYS * R);
        result.assign(D * R, 0.f), most.assign(R, -1e30f), total.assign(R, 0.f);
        for (int64_t j = first_key(s, i); j < i + block.tokens; j += KEYS) {
          int64_t n = std::min(KEYS, to - j);
          product<P>(&keys[(j - first) * D], D, queries.data(), R, scores.data(), R, n, R, D, false);
          bool edge = j + n > i + 1 || (s.window && j < i + block.tokens - s.window);
          for (int64_t c = 0; c < R; c += WIDTH) {
            Floats before = load(&most[c]), top = before;
            Ints position = load_ints(&block.position[c]);
            for (int64_t x = 0; x < n; x++) {
              Floats score = load(&scores[x * R + c]) * s.scale;
              if (s.softcap) score = s.softcap * hyperbolic_tangent(score / s.softcap).value;
              if (edge) score = hidden(s, position, j + x) ? all(-INFINITY) : score;
              store(&scores[x * R + c], score);
              top = larger(score, top);
            }
            Floats shrink = exponential(before - top), sums = load(&total[c]) * shrink;
            store(&most[c], top);
            for (int64_t x = 0; x < KEYS; x += 2) {
              Floats a = x < n ? exponential(load(&scores[x * R + c]) - top) : all(0.f);
              Floats b = x + 1 < n ? exponential(load(&scores[(x + 1) * R + c]) - top) : all(0.f);
              sums += a + b;
              put_rows(weights.data(), x, R, c, a, b);
            }
            store(&total[c], sums);
            bool grew = differs(shrink, 1.f);
            for (int64_t d = 0; d < D && grew; d++) store(&result[d * R + c], load(&result[d * R + c]) * shrink);
          }
          product<P>(&values[j - first], padded, weights.data(), R, result.data(), R, D, R, KEYS, true);
        }
        for (int64_t r = 0; r < block.rows; r++) {
          int64_t token = start + i + r / groups, head = key * groups + r % groups;
          T* row = out + (token * s.heads + head) * D;
          float share = 1.f / total[r];
          for (int64_t d = 0; d < D; d++) assign(row[d], result[d * R + r] * share);
          lse[head * s.tokens + token] = most[r] + std::log(total[r]);
        }
      }
    }
  }
}

template <typename P, typename T>
void backward(Matrix<const T> dout, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, Matrix<const T> out, const float* lse, T* dq,
              T* dk, T* dv, const int32_t* starts, int64_t examples, Shape s, int threads) {
  using E = typename P::E;
  std::vector<Task> tasks = tasks_of(starts, examples, s, threads, true);
  int64_t groups = s.heads / s.keys, D = s.width;
#pragma omp parallel num_threads(threads)
  {
    std::vector<E> keys, values, turned_keys, queries, grads, query_pairs, grad_pairs, weights, slopes, slope_rows;
    std::vector<float> scores, dweights, sum_q, sum_k, sum_v, norms, deltas;
    std::vector<const T*> rows, drows;
    Block block;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < (int64_t)tasks.size(); task++) {
      const auto& [start, length, key, from, to, is_queries, is_keys, work] = tasks[task];
      int64_t first = is_queries ? first_key(s, from) : from, end = is_keys ? to : std::min(length, to);
      // Queries that see one of these keys.
      int64_t last = !is_keys ? to : s.window ? std::min(length, to + s.window - 1) : length;
      int64_t count = end - first, padded = round_up(count, KEYS);
      keys.resize(count * D), values.resize(count * D), turned_keys.assign(D * padded, E{});
      for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < D; d++) {
          assign(keys[j * D + d], k.at(start + first + j, key)[d]);
          assign(values[j * D + d], v.at(start + first + j, key)[d]);
          turned_keys[d * padded + j] = keys[j * D + d];
        }
      if (is_keys) sum_k.assign(padded * D, 0.f), sum_v.assign(padded * D, 0.f);
      for (int64_t i = from; i < last; i += QUERIES) {
        block.open(i, length, groups);
        int64_t R = block.padded;
        rows.resize(block.rows), drows.resize(block.rows), norms.assign(R, 0.f), deltas.assign(R, 0.f);
        for (int64_t r = 0; r < block.rows; r++) {
          int64_t token = start + i + r / groups, head = key * groups + r % groups;
          rows[r] = q.at(token, head), drows[r] = dout.at(token, head);
          norms[r] = lse[head * s.tokens + token];
          const T* o = out.at(token, head);
          Floats both = all(0.f);
          for (int64_t d = 0; d < D; d += WIDTH) both += load(o + d) * load(drows[r] + d);
          deltas[r] = sum(both);
        }
        queries.resize(D * R), turned<P>(rows.data(), block.rows, R, D, queries.data());
        grads.resize(D * R), turned<P>(drows.data(), block.rows, R, D, grads.data());
        if (is_keys) {
          query_pairs.resize(D * R), paired<P>(rows.data(), block.rows, R, D, query_pairs.data());
          grad_pairs.resize(D * R), paired<P>(drows.data(), block.rows, R, D, grad_pairs.data());
        }
        scores.resize(KEYS * R), dweights.resize(KEYS * R), weights.resize(KEYS * R), slopes.resize(KEYS * R), slope_rows.resize(KEYS * R);
        sum_q.assign(D * R, 0.f);
        for (int64_t j = std::max(first, first_key(s, i)); j < std::min(end, i + block.tokens); j += KEYS) {
          int64_t n = std::min(KEYS, end - j);
          bool edge = j + n > i + 1 || (s.window && j < i + block.tokens - s.window);
          int64_t at_key = (j - first) * D;
          product<P>(&keys[at_key], D, queries.data(), R, scores.data(), R, n, R, D, false);
          product<P>(&values[at_key], D, grads.data(), R, dweights.data(), R, n, R, D, false);
          for (int64_t c = 0; c < R; c += WIDTH) {
            Floats norm = load(&norms[c]), delta = load(&deltas[c]);
            Ints position = load_ints(&block.position[c]);
            for (int64_t x = 0; x < KEYS; x += 2) {
              Floats slope[2] = {all(0.f), all(0.f)};
              for (int64_t y = 0; y < 2 && x + y < n; y++) {
                int64_t at = (x + y) * R + c;
                Floats score = load(&scores[at]) * s.scale;
                Floats factor = all(1.f);
                if (s.softcap) {
                  Tanh t = hyperbolic_tangent(score / s.softcap);
                  score = s.softcap * t.value, factor = t.slope;
                }
                Floats weight = exponential(score - norm);
                if (edge) weight = hidden(s, position, j + x + y) ? all(0.f) : weight;
                slope[y] = weight * (load(&dweights[at]) - delta) * factor;
                store(&weights[at], weight), store(&slope_rows[at], slope[y]);
              }
              put_rows(slopes.data(), x, R, c, slope[0], slope[1]);
            }
          }
          if (is_keys) {
            product<P>(weights.data(), R, grad_pairs.data(), D, &sum_v[at_key], D, n, D, R, true);
            product<P>(slope_rows.data(), R, query_pairs.data(), D, &sum_k[at_key], D, n, D, R, true);
          }
          if (is_queries) product<P>(&turned_keys[j - first], padded, slopes.data(), R, sum_q.data(), R, D, R, KEYS, true);
        }
        for (int64_t r = 0; is_queries && r < block.rows; r++) {
          T* row = dq + ((start + i + r / groups) * s.heads + key * groups + r % groups) * D;
          for (int64_t d = 0; d < D; d++) assign(row[d], sum_q[d * R + r] * s.scale);
        }
      }
      for (int64_t j = 0; is_keys && j < count; j++)
        for (int64_t d = 0; d < D; d += WIDTH) {
          int64_t at = ((start + first + j) * s.keys + key) * D + d;
          store(dk + at, load(&sum_k[j * D + d]) * s.scale);
          store(dv + at, load(&sum_v[j * D + d]));
        }
    }
  }
}

}  // namespace

// steps: distance of tokens and of heads, for each matrix in the order of the arguments.
#define ATTENTION(NAME, T, P)                                                                                                          \
  void attention_##NAME(const T* q, const T* k, const T* v, const int64_t* steps, T* out, float* lse, const int32_t* starts,           \
                        int64_t examples, int64_t tokens, int64_t heads, int64_t keys, int64_t width, int64_t window, float scale,     \
                        float softcap, int threads) {                                                                                 \
    forward<P, T>({q, steps[0], steps[1]}, {k, steps[2], steps[3]}, {v, steps[4], steps[5]}, out, lse, starts, examples,               \
                  {tokens, heads, keys, width, window, scale, softcap}, threads);                                                      \
  }                                                                                                                                    \
  void attention_backward_##NAME(const T* dout, const T* q, const T* k, const T* v, const T* out, const int64_t* steps,                \
                                 const float* lse, T* dq, T* dk, T* dv, const int32_t* starts, int64_t examples, int64_t tokens,       \
                                 int64_t heads, int64_t keys, int64_t width, int64_t window, float scale, float softcap,               \
                                 int threads) {                                                                                       \
    backward<P, T>({dout, steps[0], steps[1]}, {q, steps[2], steps[3]}, {k, steps[4], steps[5]}, {v, steps[6], steps[7]},              \
                   {out, steps[8], steps[9]}, lse, dq, dk, dv, starts, examples,                                                       \
                   {tokens, heads, keys, width, window, scale, softcap}, threads);                                                     \
  }

extern "C" {
ATTENTION(f, float, Single)
ATTENTION(h, bf16, ForHalves)
// How bfloat16 products are computed here: 2 with instructions of their own, 1 as float32.
int attention_pairs() { return ForHalves::PAIR; }
}
