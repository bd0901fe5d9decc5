// Arithmetic on rows, and the checked view of a lookup's operands.
#pragma once

#include "common.h"

namespace ultramem {

// Rows that are worked on together: as many streams from memory keep it busy, where one waits for each row's start.
constexpr int kRowsAtOnce = 4;

// out[j · stride] = ⟨x, rows[j]⟩. The same bits however rows are grouped in calls.
template <int num_rows, class T>
inline void dot_rows(const float* x, const T* const* rows, float* out, int64_t stride, int64_t width) {
  Floats parts[num_rows] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Floats part = load(x + i);
    for (int j = 0; j < num_rows; ++j) parts[j] += part * load(rows[j] + i);
  }
  for (int j = 0; j < num_rows; ++j) {
    float total = sum(parts[j]);
    for (int64_t rest = i; rest < width; ++rest) total += x[rest] * load_one(rows[j] + rest);
    out[j * stride] = total;
  }
}

// out += Σ_j weights[j · stride] · rows[j], one after the other: the same bits however rows are grouped in calls.
template <int num_rows, class T>
inline void add_rows(float* out, const T* const* rows, const float* weights, int64_t stride, int64_t width) {
  Floats w[num_rows];
  for (int j = 0; j < num_rows; ++j) w[j] = broadcast(weights[j * stride]);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Floats total = load(out + i);
    for (int j = 0; j < num_rows; ++j) total += w[j] * load(rows[j] + i);
    store(out + i, total);
  }
  for (; i < width; ++i) {
    float total = out[i];
    for (int j = 0; j < num_rows; ++j) total += weights[j * stride] * load_one(rows[j] + i);
    out[i] = total;
  }
}

// Operands of one lookup. An entry is a slot of a token: number token · num_selected + slot. Cores cut a row into
// slices with weights of their own; blocks are where slots are pooled.
template <class Index, class T>
struct Lookup {
  const Index* idx;
  const Index* block;  // nullptr for one block
  const T* table;
  int64_t num_selected, num_rows, width, row_stride, num_cores, num_blocks;

  const T* row(int64_t entry) const { return table + static_cast<int64_t>(idx[entry]) * row_stride; }
  int64_t block_start(int64_t entry) const { return block == nullptr ? 0 : static_cast<int64_t>(block[entry]) * width; }
  int64_t slice() const { return width / num_cores; }
  int64_t row_bytes() const { return width * static_cast<int64_t>(sizeof(T)); }
  void prefetch_row(int64_t entry) const { prefetch(row(entry), row_bytes()); }

  // How far ahead to prefetch: enough bytes to cover the latency of memory, few enough to stay in the second cache.
  int64_t entries_ahead() const { return std::clamp<int64_t>(24576 / std::max<int64_t>(1, row_bytes()), 8, 128); }

  // Call `visit(token, entry, count)` on groups of neighbouring entries in [first, last), each inside one token.
  template <class Visit>
  void for_groups(int64_t first, int64_t last, const Visit& visit) const {
    for (int64_t entry = first; entry < last;) {
      const int64_t token = entry / num_selected, end = std::min(last, (token + 1) * num_selected);
      for (int count; entry < end; entry += count) {
        count = static_cast<int>(std::min<int64_t>(kRowsAtOnce, end - entry));
        visit(token, entry, count);
      }
    }
  }

  // out[entry, c] = ⟨x[block], row(entry)⟩ on slice c, for `count` entries of one token; x is the token's vector.
  void dot(int64_t entry, int count, const float* x, float* out) const {
    for (int64_t core = 0; core < num_cores; ++core) {
      const int64_t start = core * slice();
      if (count == kRowsAtOnce && block == nullptr) {
        const T* rows[kRowsAtOnce];
        for (int j = 0; j < kRowsAtOnce; ++j) rows[j] = row(entry + j) + start;
        dot_rows<kRowsAtOnce>(x + start, rows, out + core, num_cores, slice());
        continue;
      }
      for (int j = 0; j < count; ++j) {
        const T* part = row(entry + j) + start;
        dot_rows<1>(x + block_start(entry + j) + start, &part, out + j * num_cores + core, num_cores, slice());
      }
    }
  }

  // out[block, c-th slice] += Σ weights[entry, c] · row(entry), for `count` entries of one token.
  void pool(int64_t entry, int count, const float* weights, float* out) const {
    for (int64_t core = 0; core < num_cores; ++core) {
      const int64_t start = core * slice();
      if (count == kRowsAtOnce && block == nullptr) {
        const T* rows[kRowsAtOnce];
        for (int j = 0; j < kRowsAtOnce; ++j) rows[j] = row(entry + j) + start;
        add_rows<kRowsAtOnce>(out + start, rows, weights + core, num_cores, slice());
        continue;
      }
      for (int j = 0; j < count; ++j) {
        const T* part = row(entry + j) + start;
        add_rows<1>(out + block_start(entry + j) + start, &part, weights + j * num_cores + core, num_cores, slice());
      }
    }
  }
};

// Raise IndexError unless all values lie in [0, bound). Compared as unsigned: negative ones are huge.
template <class Index>
inline void check_range(const Index* values, int64_t first, int64_t last, int64_t bound, const char* what) {
  uint64_t largest = 0;
  for (int64_t entry = first; entry < last; ++entry)
    largest = std::max(largest, static_cast<uint64_t>(static_cast<int64_t>(values[entry])));
  TORCH_CHECK_INDEX(first >= last || largest < static_cast<uint64_t>(bound), what, bound, ".");
}

template <class Index>
inline void check_entries(const Index* idx, const Index* block, int64_t first, int64_t last, int64_t num_rows,
                          int64_t num_blocks) {
  check_range(idx, first, last, num_rows, "an index is out of range; the number of rows is ");
  if (block != nullptr) check_range(block, first, last, num_blocks, "a block is out of range; the number of blocks is ");
}

// Indices of one lookup as plain contiguous memory, with blocks of the same type; keeps it alive.
struct Indices {
  at::Tensor idx, block;

  Indices(const at::Tensor& idx_NK, const std::optional<at::Tensor>& block_NK)
      : idx(idx_NK.contiguous()),
        block(block_NK ? block_NK->to(idx_NK.scalar_type()).contiguous() : at::Tensor()) {}

  // Call `body(idx, block)` with pointers of the indices' type; block may be null.
  template <class Body>
  void visit(const Body& body) const {
    const void* blocks = block.defined() ? block.const_data_ptr() : nullptr;
    if (idx.scalar_type() == at::kInt)
      body(static_cast<const int32_t*>(idx.const_data_ptr()), static_cast<const int32_t*>(blocks));
    else
      body(static_cast<const int64_t*>(idx.const_data_ptr()), static_cast<const int64_t*>(blocks));
  }
};

}  // namespace ultramem
