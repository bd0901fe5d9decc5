// Matrix products with weights in fp32 or bf16, read in place, and activations in fp32: what a decode step consists of.
#pragma once

#include "common.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace ultramem {

// A tile is some tokens times some rows, as many sums as a vector has lanes: folding all of them gives one vector.
constexpr int kTileTokens = kLanes / 4;
// Rows that one task multiplies, and the part of their width whose fp32 copy stays in the L1 cache beside the tokens.
constexpr int kBlockRows = 16;
constexpr int64_t kBlockWidth = 512;

// Sums of kLanes vectors' lanes, as one vector: `half` by half, always in the same order.
template <int half>
inline Floats fold_pair(Floats first, Floats second) {
  Words low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int from = lane / (2 * half) * (2 * half) + lane % half + (lane % (2 * half) < half ? 0 : kLanes);
    low[lane] = from;
    high[lane] = from + half;
  }
  return __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, high);
}

template <int half>
inline void fold_half(Floats* sums) {
  for (int i = 0; i < half; ++i) sums[i] = fold_pair<half>(sums[i], sums[i + half]);
  if constexpr (half > 1) fold_half<half / 2>(sums);
}

inline Floats fold(Floats* sums) {
  fold_half<kLanes / 2>(sums);
  return sums[0];
}

// out[t, r] (+)= <x[t], w[r]> for `tokens` tokens and kLanes / tokens rows, whose width is a multiple of kLanes. Rows
// from memory are asked for a tile ahead: further than the processor's own prefetching sees.
template <int tokens, bool from_memory, class T>
inline void multiply_tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t width, float* out,
                          int64_t out_stride, bool add) {
  constexpr int rows = kLanes / tokens;
  Floats sums[kLanes] = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    Floats activations[tokens];
#pragma GCC unroll 16
    for (int token = 0; token < tokens; ++token) activations[token] = load(x + token * x_stride + i);
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const Floats weights = load(w + row * w_stride + i);
      if (from_memory) __builtin_prefetch(w + (row + rows) * w_stride + i, 0, 3);
#pragma GCC unroll 16
      for (int token = 0; token < tokens; ++token) sums[token * rows + row] += activations[token] * weights;
    }
  }
  float results[kLanes];
  store(results, fold(sums));
  for (int token = 0; token < tokens; ++token)
    for (int row = 0; row < rows; ++row) {
      float& to = out[token * out_stride + row];
      to = results[token * rows + row] + (add ? to : 0.0f);
    }
}

// Rows that will be copied next, asked for a few cache lines at a time: arithmetic hides the time that they take.
class Coming {
 public:
  Coming() = default;
  Coming(const void* first, int64_t row_bytes, int64_t stride_bytes, int64_t num_tiles)
      : row_(static_cast<const char*>(first)), row_bytes_(row_bytes), stride_bytes_(stride_bytes), num_rows_(kBlockRows),
        lines_per_tile_((kBlockRows * ((row_bytes + kLineBytes - 1) / kLineBytes) + num_tiles - 1) / num_tiles) {}

  void ask() {
    for (int64_t line = 0; line < lines_per_tile_ && num_rows_ > 0; ++line) {
      __builtin_prefetch(row_ + offset_, 0, 2);
      offset_ += kLineBytes;
      if (offset_ < row_bytes_) continue;
      offset_ = 0;
      row_ += stride_bytes_;
      --num_rows_;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  const char* row_ = nullptr;
  int64_t row_bytes_ = 0, stride_bytes_ = 0, num_rows_ = 0, lines_per_tile_ = 0, offset_ = 0;
};

// kBlockRows rows times all tokens.
template <bool from_memory, int tokens = kTileTokens, class T>
inline void multiply_rows(const float* x, int64_t x_stride, int64_t num_tokens, const T* w, int64_t w_stride,
                          int64_t width, float* out, int64_t out_stride, bool add, Coming coming = {}) {
  int64_t token = 0;
  for (; token + tokens <= num_tokens; token += tokens)
    for (int row = 0; row < kBlockRows; row += kLanes / tokens) {
      if constexpr (!from_memory) coming.ask();
      multiply_tile<tokens, from_memory>(x + token * x_stride, x_stride, w + row * w_stride, w_stride, width,
                                         out + token * out_stride + row, out_stride, add);
    }
  if constexpr (tokens > 1)
    multiply_rows<from_memory, tokens / 2>(x + token * x_stride, x_stride, num_tokens - token, w, w_stride, width,
                                           out + token * out_stride, out_stride, add, coming);
}

// Activations [N, width] in fp32, whose rows can be read in whole vectors: beyond the width they are zero.
class Activations {
 public:
  Activations(const float* x, int64_t num_tokens, int64_t width)
      : num_tokens(num_tokens), width(width), stride((width + kLanes - 1) / kLanes * kLanes), data(x) {
    if (stride == width) return;
    padded_.resize(num_tokens * stride);
    for (int64_t token = 0; token < num_tokens; ++token)
      std::copy_n(x + token * width, width, padded_.data() + token * stride);
    data = padded_.data();
  }
  Activations(const Activations&) = delete;

  const int64_t num_tokens, width, stride;
  const float* data;

 private:
  std::vector<float> padded_;
};

// One block of up to kBlockRows rows of a weight matrix [rows, width] times all tokens.
template <class T>
inline void multiply_block(const Activations& x, const T* w, int64_t num_rows, float* out, int64_t out_stride,
                           bool add) {
  if (num_rows == kBlockRows && x.stride == x.width && x.num_tokens <= kTileTokens) {
    // Each weight is used by few tiles: widen it in registers.
    multiply_rows<true>(x.data, x.stride, x.num_tokens, w, x.width, x.width, out, out_stride, add);
    return;
  }
  const int64_t num_parts = (x.stride + kBlockWidth - 1) / kBlockWidth;
  const int64_t part = (x.stride / kLanes + num_parts - 1) / num_parts * kLanes;
  alignas(64) float copy[kBlockRows * kBlockWidth];
  std::vector<float> whole(num_rows < kBlockRows ? x.num_tokens * kBlockRows : 0);
  float* to_out = whole.empty() ? out : whole.data();
  const int64_t stride = whole.empty() ? out_stride : kBlockRows;
  for (int64_t start = 0; start < x.stride; start += part) {
    const int64_t padded = std::min(part, x.stride - start), real = std::min(part, x.width - start);
    for (int64_t row = 0; row < kBlockRows; ++row) {
      float* to = copy + row * part;
      int64_t i = 0;
      if (row < num_rows) {
        const T* from = w + row * x.width + start;
        for (; i + kLanes <= real; i += kLanes) {
          store(to + i, load(from + i));
        }
        for (; i < real; ++i) to[i] = load_one(from + i);
      }
      for (; i < padded; ++i) to[i] = 0.0f;
    }
    const bool last = start + part >= x.stride;
    const Coming coming(last ? w + kBlockRows * x.width : w + start + part, part * sizeof(T), x.width * sizeof(T),
                        std::max<int64_t>(1, x.num_tokens * kBlockRows / kLanes));
    multiply_rows<false>(x.data + start, x.stride, x.num_tokens, copy, part, padded, to_out, stride,
                         start > 0 || (add && whole.empty()), coming);
  }
  if (whole.empty()) return;
  for (int64_t token = 0; token < x.num_tokens; ++token)
    for (int64_t row = 0; row < num_rows; ++row) {
      float& to = out[token * out_stride + row];
      to = whole[token * kBlockRows + row] + (add ? to : 0.0f);
    }
}

// One of several matrices [num_rows, width] that are multiplied with the same activations.
template <class T>
struct Matrix {
  const T* weight;
  const T* bias;  // may be null
  int64_t num_rows;
  float* out;  // [N, num_rows], out_stride apart
  int64_t out_stride;
  bool add;
};

// All matrices times the activations, block by block over the threads; each result is one thread's work.
template <class T>
inline void multiply(const Activations& x, const std::vector<Matrix<T>>& matrices) {
  if (x.num_tokens == 0) return;
  int64_t num_blocks = 0;
  for (const auto& matrix : matrices) num_blocks += (matrix.num_rows + kBlockRows - 1) / kBlockRows;
  at::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t row = block * kBlockRows;
      auto matrix = matrices.begin();
      for (; row >= (matrix->num_rows + kBlockRows - 1) / kBlockRows * kBlockRows; ++matrix)
        row -= (matrix->num_rows + kBlockRows - 1) / kBlockRows * kBlockRows;
      const int64_t rows = std::min<int64_t>(kBlockRows, matrix->num_rows - row);
      float* out = matrix->out + row;
      multiply_block(x, matrix->weight + row * x.width, rows, out, matrix->out_stride, matrix->add);
      if (matrix->bias == nullptr) continue;
      for (int64_t token = 0; token < x.num_tokens; ++token)
        for (int64_t i = 0; i < rows; ++i) out[token * matrix->out_stride + i] += load_one(matrix->bias + row + i);
    }
  });
}

// Memory for intermediate results, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t num_floats) : data_(new float[num_floats]) {}
  float* data() const { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

template <class T>
inline const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

template <class T>
inline Matrix<T> matrix_of(const at::Tensor& weight, const at::Tensor& bias, float* out, int64_t out_stride, bool add) {
  return {static_cast<const T*>(weight.const_data_ptr()), data_or_null<T>(bias), weight.size(0), out, out_stride, add};
}

template <class T>
inline float inner_product(const float* x, const T* y, int64_t width) {
  Floats parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
    for (int part = 0; part < 4; ++part) parts[part] += load(x + i + part * kLanes) * load(y + i + part * kLanes);
  for (; i + kLanes <= width; i += kLanes) parts[0] += load(x + i) * load(y + i);
  float total = sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
  for (; i < width; ++i) total += x[i] * load_one(y + i);
  return total;
}

// x / rms(x) · gain; `out` may be `x`.
template <class T>
inline void normalize(const float* x, const T* gain, int64_t width, float epsilon, float* out) {
  const float scale = 1.0f / std::sqrt(inner_product(x, x, width) / static_cast<float>(width) + epsilon);
  for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * load_one(gain + i);
}

}  // namespace ultramem
