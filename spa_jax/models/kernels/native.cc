// Attention on a CPU, for XLA: exact, float32, and no key that a query does not see is read.
//
// XLA's own batched products run on one core, and know no mask: they multiply what is thrown away
// afterwards. Here a piece of work is the queries of one head (or of the heads that share a key
// head), XLA's threads share the pieces, and every product is cut to the keys in sight.
//
// Dimensions: B rows, T tokens, H query heads, G key heads, R = H / G, K head size, S slots, C
// places of a cache. `native.py` compiles this file, and says what the functions compute.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using In = ffi::Buffer<ffi::F32>;
using Indices = ffi::Buffer<ffi::S32>;
using Out = ffi::ResultBuffer<ffi::F32>;

#if defined(__AVX512F__)
constexpr int kWidth = 16;   // floats of a vector
constexpr int kVectors = 4;  // vectors of a tile: with kRows, as many sums as registers hold
#else
constexpr int kWidth = 8;
constexpr int kVectors = 2;
#endif
constexpr int kRows = 4;     // rows of a tile
constexpr int kQueries = 32; // queries whose scores exist at once
constexpr float kMasked = -1e30f;

typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(int32_t))));

inline Floats Load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void Store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline int64_t RoundUp(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// e^x for x <= 0, to 2e-7 of it, and 0 below e^-87: 2^n times a polynomial (Cephes' expf).
inline Floats Exp(Floats x) {
  const Floats least = Floats{} - 87.0f;
  const auto vanishes = x < least;
  x = vanishes ? least : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats shifted = x * 1.44269504f + magic;
  const Ints n = (Ints)shifted - (Ints)(Floats{} + magic);
  const Floats whole = shifted - magic;
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return vanishes ? Floats{} : p * (Floats)((n + 127) << 23);
}

// A matrix that is read: element (row, column) lies at data[row * down + column * right].
struct Matrix {
  const float* data;
  int64_t down, right;

  const float* At(int64_t row, int64_t column) const { return data + row * down + column * right; }
};

// out[m, :] (+)= sum_i a(m, i) b(i, :) for M rows and N vectors of columns.
template <int M, int N, bool add>
inline void Tile(int64_t inner, Matrix a, const float* b, int64_t b_down, float* out,
                 int64_t out_down) {
  Floats sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < N; ++j) sum[m][j] = add ? Load(out + m * out_down + j * kWidth) : Floats{};
  for (int64_t i = 0; i < inner; ++i) {
    for (int j = 0; j < N; ++j) {
      const Floats right = Load(b + i * b_down + j * kWidth);
      for (int m = 0; m < M; ++m) sum[m][j] += *a.At(m, i) * right;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < N; ++j) Store(out + m * out_down + j * kWidth, sum[m][j]);
}

template <int M, bool add>
inline void Band(int64_t inner, int64_t columns, Matrix a, const float* b, int64_t b_down,
                 float* out, int64_t out_down) {
  int64_t j = 0;
  for (; j + kVectors * kWidth <= columns; j += kVectors * kWidth)
    Tile<M, kVectors, add>(inner, a, b + j, b_down, out + j, out_down);
  for (; j + kWidth <= columns; j += kWidth)
    Tile<M, 1, add>(inner, a, b + j, b_down, out + j, out_down);
  for (; j < columns; ++j) {
    for (int m = 0; m < M; ++m) {
      float sum = add ? out[m * out_down + j] : 0.0f;
      for (int64_t i = 0; i < inner; ++i) sum += *a.At(m, i) * b[i * b_down + j];
      out[m * out_down + j] = sum;
    }
  }
}

// out = a b, or out += a b; b's and out's columns lie side by side.
template <bool add>
void Product(int64_t rows, int64_t inner, int64_t columns, Matrix a, const float* b,
             int64_t b_down, float* out, int64_t out_down) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    Band<kRows, add>(inner, columns, {a.At(m, 0), a.down, a.right}, b, b_down, out + m * out_down,
                     out_down);
  const Matrix rest = {a.At(m, 0), a.down, a.right};
  float* to = out + m * out_down;
  switch (rows - m) {
    case 3: Band<3, add>(inner, columns, rest, b, b_down, to, out_down); break;
    case 2: Band<2, add>(inner, columns, rest, b, b_down, to, out_down); break;
    case 1: Band<1, add>(inner, columns, rest, b, b_down, to, out_down); break;
  }
}

// Puts e^(s - max) in the place of the first `seen` scores, 0 behind them up to `padded`, and
// returns the logarithm of sum e^s; *inverse becomes 1 / sum e^(s - max).
float Soften(float* scores, int64_t seen, int64_t padded, float scale, float* inverse) {
  std::fill(scores + seen, scores + padded, kMasked);
  Floats top = Load(scores);
  for (int64_t j = kWidth; j < padded; j += kWidth) {
    const Floats x = Load(scores + j);
    top = x > top ? x : top;
  }
  float largest = top[0];
  for (int j = 1; j < kWidth; ++j) largest = std::max(largest, top[j]);
  Floats sums = {};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Floats x = Exp((Load(scores + j) - largest) * scale);
    sums += x;
    Store(scores + j, x);
  }
  float sum = 0;
  for (int j = 0; j < kWidth; ++j) sum += sums[j];
  *inverse = 1.0f / sum;
  return largest * scale + std::log(sum);
}

// Calls f(0), f(1), ... f(items - 1) on XLA's threads, this one among them.
template <typename F>
void Parallel(ffi::ThreadPool& pool, int64_t items, F f) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  // A helper may start when all is done and this function has returned: it finds nothing to do,
  // in memory that it shares.
  auto progress = std::make_shared<Progress>();
  auto work = [progress, items, f] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < items;) {
      f(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), items) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (progress->done.load(std::memory_order_acquire) < items) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// Memory of this thread, that lives as long as it does; its contents are anything.
float* Scratch(int which, int64_t size) {
  thread_local std::vector<float> memory[4];
  if ((int64_t)memory[which].size() < size) memory[which].resize(size);
  return memory[which].data();
}

// ---- new tokens and a cache --------------------------------------------------------------------

ffi::Error Cached(ffi::ThreadPool pool, In q, In k, In v, Indices positions, Indices rows,
                  Out out) {
  const auto of_q = q.dimensions(), of_v = v.dimensions();
  const int64_t B = of_q[0], T = of_q[1], H = of_q[2], K = of_q[3];
  const int64_t S = of_v[0], G = of_v[1], C = of_v[2], R = H / G;
  const float *queries = q.typed_data(), *keys = k.typed_data(), *values = v.typed_data();
  const int32_t *position = positions.typed_data(), *row = rows.typed_data();
  float* to = out->typed_data();
  const float scale = 1.0f / std::sqrt((float)K);
  Parallel(pool, B * G, [=](int64_t item) {
    const int64_t b = item / G, g = item % G, slot = row[b], wide = RoundUp(C);
    const float* my_keys = keys + (slot * G + g) * K * C;
    const float* my_values = values + (slot * G + g) * C * K;
    float* scores = Scratch(0, kQueries * wide);
    float *asked = Scratch(1, kQueries * K), *mixed = Scratch(2, kQueries * K);
    int64_t at[kQueries], seen[kQueries], count = 0, most = 0;
    auto flush = [&] {
      // What is behind a row of keys, up to a whole vector, is masked; behind the last one it may
      // be nobody's memory.
      const int64_t padded = RoundUp(most);
      Product<false>(count, K, std::min(padded, C), {asked, K, 1}, my_keys, C, scores, wide);
      float inverse[kQueries];
      for (int64_t m = 0; m < count; ++m)
        Soften(scores + m * wide, seen[m], padded, scale, inverse + m);
      Product<false>(count, most, K, {scores, wide, 1}, my_values, K, mixed, K);
      for (int64_t m = 0; m < count; ++m)
        for (int64_t i = 0; i < K; ++i) to[at[m] + i] = mixed[m * K + i] * inverse[m];
      count = most = 0;
    };
    for (int64_t t = 0; t < T; ++t) {
      const int64_t p = position[b * T + t];
      for (int64_t r = 0; r < R; ++r) {
        const int64_t place = ((b * T + t) * H + g * R + r) * K;
        if (p >= C || slot >= S) {  // padding
          std::memset(to + place, 0, K * sizeof(float));
          continue;
        }
        std::memcpy(asked + count * K, queries + place, K * sizeof(float));
        at[count] = place;
        seen[count] = p + 1;
        most = std::max(most, p + 1);
        if (++count == kQueries) flush();
      }
    }
    if (count) flush();
  });
  return ffi::Error::Success();
}

// ---- packed rows ------------------------------------------------------------------------------

// Up to kQueries tokens of one segment, [first, last). They see the row's first `shared` tokens,
// and of [own, last) those up to themselves.
//
//     segment_ids  -1 -1 1 1 1 2 2 2     block of 6, 7: shared 2, own 5
//     keys of it    0  1 . . . 5 6 7     in the scores: 0 1 | 5 6 7
struct Block {
  int64_t first, last, shared, own;

  int64_t Count() const { return last - first; }
  int64_t Keys() const { return shared + last - own; }
  int64_t Seen(int64_t m) const { return shared + first + m - own + 1; }
};

std::vector<Block> Blocks(const int32_t* segments, int64_t T, int32_t prefix) {
  int64_t shared = 0;
  while (shared < T && segments[shared] == prefix) ++shared;
  std::vector<Block> blocks;
  for (int64_t own = 0, end; own < T; own = end) {
    for (end = own; end < T && segments[end] == segments[own];) ++end;
    for (int64_t first = own; first < end; first += kQueries)
      blocks.push_back({first, std::min(first + kQueries, end), own ? shared : 0, own});
  }
  return blocks;
}

// [T, K] of one head, out of [T, heads, K], as [K, wide].
void Transpose(const float* from, int64_t down, int64_t T, int64_t K, float* to, int64_t wide) {
  for (int64_t t0 = 0; t0 < T; t0 += kWidth)
    for (int64_t i = 0; i < K; ++i)
      for (int64_t t = t0; t < std::min(t0 + kWidth, T); ++t) to[i * wide + t] = from[t * down + i];
}

// out [m, key] = a_m . b_key for the keys that a block sees; b is transposed. Both parts are
// written in whole vectors: the second one covers what the first wrote too much.
void Scores(const Block& block, int64_t K, Matrix a, const float* b, int64_t wide, float* out) {
  Product<false>(block.Count(), K, RoundUp(block.shared), a, b, wide, out, wide);
  Product<false>(block.Count(), K, RoundUp(block.last - block.own), a, b + block.own, wide,
                 out + block.shared, wide);
}

// out [m, :] = sum over the keys that a block sees of weights [m, key] b [key, :].
void Mix(const Block& block, int64_t K, const float* weights, int64_t wide, const float* b,
         int64_t b_down, float* out, int64_t out_down) {
  Product<false>(block.Count(), block.shared, K, {weights, wide, 1}, b, b_down, out, out_down);
  Product<true>(block.Count(), block.last - block.own, K, {weights + block.shared, wide, 1},
                b + block.own * b_down, b_down, out, out_down);
}

// out [key, :] += sum over a block's queries of weights [m, key] b [m, :].
void Scatter(const Block& block, int64_t K, const float* weights, int64_t wide, const float* b,
             int64_t b_down, float* out, int64_t out_down) {
  Product<true>(block.shared, block.Count(), K, {weights, 1, wide}, b, b_down, out, out_down);
  Product<true>(block.last - block.own, block.Count(), K, {weights + block.shared, 1, wide}, b,
                b_down, out + block.own * out_down, out_down);
}

// Room for all keys of a row and the whole vectors that `Scores` writes.
int64_t Wide(int64_t T) { return RoundUp(T) + 2 * kWidth; }

ffi::Error Packed(ffi::ThreadPool pool, int32_t prefix, In q, In k, In v, Indices segments,
                  Out out, Out log_sums) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const int64_t B = of_q[0], T = of_q[1], H = of_q[2], K = of_q[3], G = of_k[2], wide = Wide(T);
  const float *queries = q.typed_data(), *keys = k.typed_data(), *values = v.typed_data();
  const int32_t* segment = segments.typed_data();
  float *to = out->typed_data(), *sums = log_sums->typed_data();
  const float scale = 1.0f / std::sqrt((float)K);
  Parallel(pool, B * H, [=](int64_t item) {
    const int64_t b = item / H, h = item % H, g = h / (H / G), down = H * K, kv_down = G * K;
    const float* my_values = values + (b * T * G + g) * K;
    float *transposed = Scratch(0, K * wide), *scores = Scratch(1, kQueries * wide);
    Transpose(keys + (b * T * G + g) * K, kv_down, T, K, transposed, wide);
    for (const Block& block : Blocks(segment + b * T, T, prefix)) {
      const int64_t at = ((b * T + block.first) * H + h) * K, padded = RoundUp(block.Keys());
      float inverse[kQueries];
      Scores(block, K, {queries + at, down, 1}, transposed, wide, scores);
      for (int64_t m = 0; m < block.Count(); ++m)
        sums[(b * T + block.first + m) * H + h] =
            Soften(scores + m * wide, block.Seen(m), padded, scale, inverse + m);
      Mix(block, K, scores, wide, my_values, kv_down, to + at, down);
      for (int64_t m = 0; m < block.Count(); ++m)
        for (int64_t i = 0; i < K; ++i) to[at + m * down + i] *= inverse[m];
    }
  });
  return ffi::Error::Success();
}

// With P = e^(S - L) and D = rowsum(dO * O): dV = P^T dO, dS = P * (dO V^T - D), dQ = dS K,
// dK = dS^T Q. Gradients of keys and values are those of each query head.
ffi::Error PackedBackward(ffi::ThreadPool pool, int32_t prefix, In q, In k, In v,
                          Indices segments, In out, In log_sums, In d_out, Out d_q, Out d_k,
                          Out d_v) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const int64_t B = of_q[0], T = of_q[1], H = of_q[2], K = of_q[3], G = of_k[2], wide = Wide(T);
  const float *queries = q.typed_data(), *keys = k.typed_data(), *values = v.typed_data();
  const float *outs = out.typed_data(), *sums = log_sums.typed_data(), *d_outs = d_out.typed_data();
  const int32_t* segment = segments.typed_data();
  float *to_q = d_q->typed_data(), *to_k = d_k->typed_data(), *to_v = d_v->typed_data();
  const float scale = 1.0f / std::sqrt((float)K);
  Parallel(pool, B * H, [=](int64_t item) {
    const int64_t b = item / H, h = item % H, g = h / (H / G), down = H * K, kv_down = G * K;
    const int64_t mine = (b * T * H + h) * K;
    const float* my_keys = keys + (b * T * G + g) * K;
    float *keys_across = Scratch(0, K * wide), *values_across = Scratch(1, K * wide);
    float *weights = Scratch(2, kQueries * wide), *d_scores = Scratch(3, kQueries * wide);
    Transpose(my_keys, kv_down, T, K, keys_across, wide);
    Transpose(values + (b * T * G + g) * K, kv_down, T, K, values_across, wide);
    for (int64_t t = 0; t < T; ++t) {
      std::memset(to_k + mine + t * down, 0, K * sizeof(float));
      std::memset(to_v + mine + t * down, 0, K * sizeof(float));
    }
    for (const Block& block : Blocks(segment + b * T, T, prefix)) {
      const int64_t at = mine + block.first * down, padded = RoundUp(block.Keys());
      Scores(block, K, {queries + at, down, 1}, keys_across, wide, weights);
      Scores(block, K, {d_outs + at, down, 1}, values_across, wide, d_scores);
      for (int64_t m = 0; m < block.Count(); ++m) {
        float *weight = weights + m * wide, *d_score = d_scores + m * wide, inner = 0;
        for (int64_t i = 0; i < K; ++i) inner += d_outs[at + m * down + i] * outs[at + m * down + i];
        const float log_sum = sums[(b * T + block.first + m) * H + h];
        for (int64_t j = block.Seen(m); j < padded; ++j) weight[j] = kMasked, d_score[j] = 0;
        for (int64_t j = 0; j < padded; j += kWidth) {
          const Floats p = Exp(Load(weight + j) * scale - log_sum);
          Store(d_score + j, p * (Load(d_score + j) - inner) * scale);
          Store(weight + j, p);
        }
      }
      Mix(block, K, d_scores, wide, my_keys, kv_down, to_q + at, down);
      Scatter(block, K, d_scores, wide, queries + at, down, to_k + mine, down);
      Scatter(block, K, weights, wide, d_outs + at, down, to_v + mine, down);
    }
  });
  return ffi::Error::Success();
}

// What both functions of packed rows take first.
auto OfRows() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int32_t>("prefix")
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<Indices>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpaCachedAttention, Cached,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<Indices>()
                                  .Arg<Indices>()
                                  .Ret<In>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpaPackedAttention, Packed, OfRows().Ret<In>().Ret<In>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpaPackedAttentionBackward, PackedBackward,
                              OfRows().Arg<In>().Arg<In>().Arg<In>().Ret<In>().Ret<In>().Ret<In>());
