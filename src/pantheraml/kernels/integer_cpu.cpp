// A language model in whole numbers, all layers of it for some tokens at a time: what integer_network.py computes, bit for bit.
//
// Products are of unsigned and signed bytes, four at a time with sums in 32 bits (VNNI where the processor has it): of a signed byte
// 128 more is taken, and 128 times the sum of the other factors is taken off again. No sum leaves 32 bits, see docs/nbmf.md.
// Letters: V vocabulary, D hidden, H heads, G groups, E a head's size, I inner size, N tokens of a chunk.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int64_t LANES = 16, QUAD = 4, CHUNK = 48;
constexpr int32_t ACTIVATION = 127, OUTPUT = (1 << 15) - 1, SUM = (1 << 20) - 1, SCORES = 320, LOGITS = 1984, SILU = 2048;

Ints load(const void* at) {
  Ints found;
  return std::memcpy(&found, at, sizeof found), found;
}

Ints all(int32_t x) { return Ints{} + x; }

Ints all_quad(const void* at) {
  int32_t four;
  return std::memcpy(&four, at, 4), all(four);
}

Ints clamp(Ints x, int32_t most) {
  x = x > most ? all(most) : x;
  return x < -most ? all(-most) : x;
}

int32_t clamp(int32_t x, int32_t least, int32_t most) { return std::min(std::max(x, least), most); }

int32_t shifted(int32_t x, int64_t bits) { return (x + (1 << (bits - 1))) >> bits; }

// How many of 2**first, 2**(first + step), .., 2**last are at most x.
int32_t reached(int32_t x, int first, int step, int last) {
  int32_t found = 0;
  for (int level = first; level <= last; level += step) found += x >= (1 << level);
  return found;
}

int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Adds the products of four unsigned and four signed bytes in each lane.
Ints dot(Ints sum, Ints unsigned_quads, Ints signed_quads) {
#ifdef __AVX512VNNI__
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_quads, (__m512i)signed_quads);
#else
  for (int k = 0; k < 4; k++) sum += (unsigned_quads >> (8 * k) & 255) * ((signed_quads << (24 - 8 * k)) >> 24);
  return sum;
#endif
}

struct Linear {
  const int8_t* weight;  // [O / 16, I / 4, 16, 4], with zeros to whole blocks
  const int32_t *scale, *bias, *offset;
  int64_t in, out, shift;
};

struct Norm {
  const int32_t* roots;
  int64_t shift;
};

struct Layer {
  Norm attention;
  Linear qkv;
  const int32_t *score, *score_shift;
  int64_t gain;
  Linear added;
  Norm mlp;
  Linear gate_up;
  int64_t gated_shift;
  Linear down;
};

// Reads what integer_native.py wrote, word by word.
struct Reader {
  const int64_t* at;
  int64_t number() { return *at++; }
  template <typename T>
  const T* pointer() {
    return reinterpret_cast<const T*>(*at++);
  }
  Linear linear() {
    Linear l;
    l.weight = pointer<int8_t>(), l.scale = pointer<int32_t>(), l.bias = pointer<int32_t>(), l.offset = pointer<int32_t>();
    l.in = number(), l.out = number(), l.shift = number();
    return l;
  }
  Norm norm() {
    Norm n;
    n.roots = pointer<int32_t>(), n.shift = number();
    return n;
  }
};

struct Model {
  int64_t vocabulary, hidden, heads, groups, head, inner, square_shift, vocabulary_bits;
  const int32_t *embedded, *cosines, *sines, *silu, *attended, *likely;
  Norm last;
  Linear logits;
  std::vector<Layer> layers;

  explicit Model(const int64_t* words) {
    Reader r{words};
    vocabulary = r.number(), hidden = r.number(), heads = r.number(), groups = r.number(), head = r.number(), inner = r.number();
    square_shift = r.number(), vocabulary_bits = r.number();
    embedded = r.pointer<int32_t>(), cosines = r.pointer<int32_t>(), sines = r.pointer<int32_t>(), silu = r.pointer<int32_t>();
    attended = r.pointer<int32_t>(), likely = r.pointer<int32_t>();
    last = r.norm(), logits = r.linear();
    layers.resize(r.number());
    for (Layer& l : layers) {
      l.attention = r.norm(), l.qkv = r.linear(), l.score = r.pointer<int32_t>(), l.score_shift = r.pointer<int32_t>(), l.gain = r.number();
      l.added = r.linear(), l.mlp = r.norm(), l.gate_up = r.linear(), l.gated_shift = r.number(), l.down = r.linear();
    }
  }
};

// Keys and values of some rows, as bytes: keys, plus 128, [L, rows, G, E / 4, places, 4]; values [L, rows, G, places / 4, E, 4].
struct Cache {
  uint8_t* keys;
  int8_t* values;
  int64_t rows, places, wide;  // places: whole lanes of them; wide: E, in whole lanes
  uint8_t* key(const Model& m, int64_t layer, int64_t row, int64_t group) const {
    return keys + ((layer * rows + row) * m.groups + group) * padded(m.head, QUAD) * places;
  }
  int8_t* value(const Model& m, int64_t layer, int64_t row, int64_t group) const {
    return values + ((layer * rows + row) * m.groups + group) * wide * places;
  }
};

struct Token {
  int32_t number;
  int64_t row, place;
};

template <int M, int N>
inline __attribute__((always_inline)) void tile(const uint8_t* x, int64_t x_row, const Linear& l, int64_t block, int32_t* y, int64_t y_row,
                                               int32_t most) {
  const int64_t quads = padded(l.in, QUAD) / QUAD;
  Ints sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sums[i][j] = all(0);
  const int8_t* w = l.weight + block * quads * 64;
  for (int64_t k = 0; k < quads; k++) {
    Ints weights[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) weights[j] = load(w + (j * quads + k) * 64);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      Ints four = all_quad(x + i * x_row + k * QUAD);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sums[i][j] = dot(sums[i][j], four, weights[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; j++) {
    const int64_t at = (block + j) * LANES;
    const Ints scale = load(l.scale + at), bias = load(l.bias + at), offset = load(l.offset + at);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      Ints found = clamp(((sums[i][j] - offset) * scale + bias) >> (int)l.shift, most);
      std::memcpy(y + i * y_row + at, &found, sizeof found);
    }
  }
}

template <int N>
void strip(const uint8_t* x, int64_t x_row, const Linear& l, int64_t block, int32_t* y, int64_t y_row, int64_t n, int32_t most) {
  int64_t i = 0;
  for (; i + 6 <= n; i += 6) tile<6, N>(x + i * x_row, x_row, l, block, y + i * y_row, y_row, most);
  for (; i + 2 <= n; i += 2) tile<2, N>(x + i * x_row, x_row, l, block, y + i * y_row, y_row, most);
  for (; i < n; i++) tile<1, N>(x + i * x_row, x_row, l, block, y + i * y_row, y_row, most);
}

// y [N, O in whole lanes] of x [N, I in whole quads], which holds 128 more.
void linear(const uint8_t* x, const Linear& l, int32_t* y, int64_t n, int32_t most) {
  const int64_t blocks = padded(l.out, LANES) / LANES, x_row = padded(l.in, QUAD), y_row = padded(l.out, LANES);
  int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) strip<4>(x, x_row, l, block, y, y_row, n, most);
  for (; block < blocks; block++) strip<1>(x, x_row, l, block, y, y_row, n, most);
}

// One token's numbers as the unsigned bytes that a product takes.
void narrow(const int32_t* x, uint8_t* out, int64_t size) {
  for (int64_t i = 0; i < size; i++) out[i] = clamp(x[i], -ACTIVATION, ACTIVATION) + 128;
  for (int64_t i = size; i < padded(size, QUAD); i++) out[i] = 128;
}

void normed(const Model& m, const int32_t* x, const Norm& norm, int32_t* u, uint8_t* out) {
  int32_t peak = 0, square = 0;
  for (int64_t d = 0; d < m.hidden; d++) peak = std::max(peak, std::abs(x[d]));
  const int32_t down = reached(peak, 14, 1, 20);
  for (int64_t d = 0; d < m.hidden; d++) {
    u[d] = x[d] >> down;
    const int32_t small = u[d] >> m.square_shift;
    square += small * small;
  }
  const int32_t half = reached(square, 12, 2, 30), root = norm.roots[square >> (2 * half)];
  const int64_t shift = half + norm.shift;
  for (int64_t d = 0; d < m.hidden; d++) u[d] = shifted(u[d] * root, shift);
  narrow(u, out, m.hidden);
}

// What is computed for a chunk.
struct Scratch {
  std::vector<int32_t> x, y, mixed, scores;
  std::vector<uint8_t> narrow, weights;
  explicit Scratch(const Model& m, int64_t places) {
    const int64_t row = (m.heads + 2 * m.groups) * m.head;
    const int64_t widest = padded(std::max({row, 2 * m.inner, m.vocabulary, m.hidden}), LANES);
    const int64_t taken = padded(std::max({m.hidden, m.inner, m.heads * m.head}), LANES);
    x.resize(CHUNK * m.hidden), y.resize(CHUNK * widest), mixed.resize(taken), scores.resize(places);
    narrow.resize(CHUNK * taken), weights.resize(places + LANES);
  }
};

// What a head takes from the places up to this one: int32 [E].
void attend(const Model& m, const Layer& l, int64_t h, const int8_t* query, const uint8_t* keys, const int8_t* values, const Cache& c,
            int64_t place, Scratch& s, int32_t* out) {
  const int64_t quads = padded(m.head, QUAD) / QUAD, seen = place + 1;
  int32_t sum = 0, most = INT32_MIN, total = 0;
  for (int64_t e = 0; e < m.head; e++) sum += query[e];
  for (int64_t j = 0; j < seen; j += LANES) {
    Ints score = all(-128 * sum);
    for (int64_t k = 0; k < quads; k++) score = dot(score, load(keys + (k * c.places + j) * QUAD), all_quad(query + k * QUAD));
    std::memcpy(s.scores.data() + j, &score, sizeof score);
  }
  for (int64_t j = 0; j < seen; j++) most = std::max(most, s.scores[j]);
  const int32_t times = l.score[h], shift = l.score_shift[h];
  for (int64_t j = 0; j < seen; j++) {
    const int32_t below = std::min(most - s.scores[j], 1 << 22);
    const int32_t weight = m.attended[std::min(below * times >> shift, SCORES - 1)];
    s.weights[j] = weight, total += weight;
  }
  for (int64_t j = seen; j < padded(seen, QUAD); j++) s.weights[j] = 0;
  const int32_t down = reached(total, 9, 1, 18), share = (int32_t)((l.gain << down) / total);
  for (int64_t e = 0; e < m.head; e += LANES) {
    Ints mixed = all(0);
    for (int64_t j = 0; j < seen; j += QUAD) mixed = dot(mixed, all_quad(s.weights.data() + j), load(values + j * c.wide + e * QUAD));
    for (int64_t i = 0; i < std::min(LANES, m.head - e); i++) out[e + i] = shifted((mixed[i] >> down) * share, 17);
  }
}

// Queries, keys and values of a token from the outputs of its layer: keys and values into the cache, queries narrow in place.
void turn(const Model& m, int64_t layer, const int32_t* y, const Token& t, const Cache& c, int8_t* queries) {
  const int64_t half = m.head / 2, row = padded(m.head, QUAD);
  const int32_t *cosines = m.cosines + t.place * half, *sines = m.sines + t.place * half;
  std::memset(queries, 0, m.heads * row);
  for (int64_t h = 0; h < m.heads + m.groups; h++) {
    const int32_t *first = y + h * m.head, *second = first + half;
    uint8_t* keys = h < m.heads ? nullptr : c.key(m, layer, t.row, h - m.heads);
    auto put = [&](int64_t e, int32_t turned) {
      const int32_t found = clamp(shifted(turned, 20), -ACTIVATION, ACTIVATION);
      if (keys)
        keys[(e / QUAD * c.places + t.place) * QUAD + e % QUAD] = found + 128;
      else
        queries[h * row + e] = found;
    };
    for (int64_t i = 0; i < half; i++) {
      put(i, first[i] * cosines[i] - second[i] * sines[i]);
      put(i + half, second[i] * cosines[i] + first[i] * sines[i]);
    }
  }
  for (int64_t g = 0; g < m.groups; g++) {
    int8_t* values = c.value(m, layer, t.row, g) + t.place / QUAD * QUAD * c.wide + t.place % QUAD;
    const int32_t* from = y + (m.heads + m.groups + g) * m.head;
    for (int64_t e = 0; e < m.head; e++) values[e * QUAD] = clamp(shifted(from[e], 6), -ACTIVATION, ACTIVATION);
  }
}

// All layers for some tokens; of a row those that come first stand first. Leaves x behind the layers in the scratch.
void layers(const Model& m, const Token* tokens, int64_t n, const Cache& c, Scratch& s) {
  const int64_t d = m.hidden, out = m.heads * m.head, row = padded(m.head, QUAD);
  std::vector<int8_t> queries(n * m.heads * row);
  for (int64_t i = 0; i < n; i++) std::memcpy(&s.x[i * d], m.embedded + tokens[i].number * d, d * sizeof(int32_t));
  auto add = [&](const Linear& l) {
    linear(s.narrow.data(), l, s.y.data(), n, SUM);
    const int64_t y_row = padded(d, LANES);
    for (int64_t i = 0; i < n; i++)
      for (int64_t k = 0; k < d; k++) s.x[i * d + k] = clamp(s.x[i * d + k] + s.y[i * y_row + k], -SUM, SUM);
  };
  auto norms = [&](const Norm& norm) {
    for (int64_t i = 0; i < n; i++) normed(m, &s.x[i * d], norm, s.mixed.data(), &s.narrow[i * padded(d, QUAD)]);
  };
  for (size_t at = 0; at < m.layers.size(); at++) {
    const Layer& l = m.layers[at];
    norms(l.attention);
    linear(s.narrow.data(), l.qkv, s.y.data(), n, OUTPUT);
    const int64_t qkv_row = padded(l.qkv.out, LANES), both_row = padded(2 * m.inner, LANES);
    for (int64_t i = 0; i < n; i++) turn(m, at, &s.y[i * qkv_row], tokens[i], c, &queries[i * m.heads * row]);
    for (int64_t i = 0; i < n; i++) {
      const Token& t = tokens[i];
      for (int64_t h = 0; h < m.heads; h++) {
        const int64_t g = h * m.groups / m.heads;
        attend(m, l, h, &queries[(i * m.heads + h) * row], c.key(m, at, t.row, g), c.value(m, at, t.row, g), c, t.place, s, &s.mixed[h * m.head]);
      }
      narrow(s.mixed.data(), &s.narrow[i * padded(out, QUAD)], out);
    }
    add(l.added);
    norms(l.mlp);
    linear(s.narrow.data(), l.gate_up, s.y.data(), n, OUTPUT);
    for (int64_t i = 0; i < n; i++) {
      const int32_t *gate = &s.y[i * both_row], *up = gate + m.inner;
      for (int64_t k = 0; k < m.inner; k++) s.mixed[k] = shifted(m.silu[clamp(gate[k], -SILU, SILU - 1) + SILU] * up[k], l.gated_shift);
      narrow(s.mixed.data(), &s.narrow[i * padded(m.inner, QUAD)], m.inner);
    }
    add(l.down);
  }
}

// Frequencies behind each of the tokens, in the scratch: int32 [N, V in whole lanes].
void frequencies(const Model& m, int64_t first, int64_t n, Scratch& s) {
  const int64_t row = padded(m.vocabulary, LANES);
  for (int64_t i = 0; i < n; i++) normed(m, &s.x[(first + i) * m.hidden], m.last, s.mixed.data(), &s.narrow[i * padded(m.hidden, QUAD)]);
  linear(s.narrow.data(), m.logits, s.y.data(), n, OUTPUT);
  for (int64_t i = 0; i < n; i++) {
    int32_t *y = &s.y[i * row], most = INT32_MIN, coarse = (int32_t)m.vocabulary;
    for (int64_t v = 0; v < m.vocabulary; v++) most = std::max(most, y[v]);
    for (int64_t v = 0; v < m.vocabulary; v++) {
      y[v] = m.likely[std::min(most - y[v], LOGITS - 1)];
      coarse += y[v] >> m.vocabulary_bits;
    }
    const int32_t down = reached(coarse, 30 - (int)m.vocabulary_bits, 1, 30);
    for (int64_t v = 0; v < m.vocabulary; v++) y[v] = (y[v] >> down) + 1;
  }
}

}  // namespace

extern "C" {

// Windows from their beginnings: rows of `length` tokens; of the last `asked` of each, where the target stands: found [3, rows, asked].
// asked 0: keys and values alone.
void integer_windows(const int64_t* words, const int32_t* tokens, int64_t rows, int64_t length, uint8_t* keys, int8_t* values,
                     int64_t cache_rows, int64_t places, int64_t wide, const int32_t* targets, int64_t asked,
                     int32_t* found) {
  const Model m(words);
  const Cache cache{keys, values, cache_rows, places, wide};
#pragma omp parallel
  {
    Scratch s(m, places);
    std::vector<Token> some(CHUNK);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t at = 0; at < length; at += CHUNK) {
        const int64_t n = std::min(CHUNK, length - at);
        for (int64_t i = 0; i < n; i++) some[i] = {tokens[r * length + at + i], r, at + i};
        layers(m, some.data(), n, cache, s);
        const int64_t first = std::max<int64_t>(0, length - asked - at);
        if (first >= n) continue;
        frequencies(m, first, n - first, s);
        for (int64_t i = first; i < n; i++) {
          const int64_t place = r * asked + at + i - (length - asked);
          const int32_t *y = &s.y[(i - first) * padded(m.vocabulary, LANES)], target = targets[place];
          int32_t start = 0, total = 0;
          for (int64_t v = 0; v < target; v++) start += y[v];
          for (int64_t v = target; v < m.vocabulary; v++) total += y[v];
          found[place] = start, found[rows * asked + place] = y[target], found[2 * rows * asked + place] = start + total;
        }
      }
  }
}

// One more token in each row, all at the same place: where the frequencies behind it end, int32 [rows, V]. threads: that share them.
void integer_step(const int64_t* words, const int32_t* tokens, int64_t rows, int64_t place, uint8_t* keys, int8_t* values, int64_t places,
                  int64_t wide, int64_t threads, int32_t* ends) {
  const Model m(words);
  const Cache cache{keys, values, rows, places, wide};
  const int64_t at_once = std::min(CHUNK, (rows + threads - 1) / threads);
#pragma omp parallel if (rows > 1)
  {
    Scratch s(m, places);
    std::vector<Token> some(CHUNK);
#pragma omp for schedule(dynamic)
    for (int64_t at = 0; at < rows; at += at_once) {
      const int64_t n = std::min(at_once, rows - at);
      for (int64_t i = 0; i < n; i++) some[i] = {tokens[at + i], at + i, place};
      layers(m, some.data(), n, cache, s);
      frequencies(m, 0, n, s);
      for (int64_t i = 0; i < n; i++) {
        const int32_t* y = &s.y[i * padded(m.vocabulary, LANES)];
        int32_t end = 0;
        for (int64_t v = 0; v < m.vocabulary; v++) ends[(at + i) * m.vocabulary + v] = end += y[v];
      }
    }
  }
}

}  // extern "C"
