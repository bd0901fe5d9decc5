// Arithmetic on one row, and the checked view of a lookup's operands.
#pragma once

#include "common.h"

namespace ultramem {

// ⟨x, row⟩ in four partial sums, so that additions do not wait for each other.
template <class T>
inline float dot(const float* x, const T* row, int64_t width) {
  Floats parts[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
    for (int part = 0; part < 4; ++part) parts[part] += load(x + i + part * kLanes) * load(row + i + part * kLanes);
  for (; i + kLanes <= width; i += kLanes) parts[0] += load(x + i) * load(row + i);
  float total = sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
  for (; i < width; ++i) total += x[i] * load_one(row + i);
  return total;
}

// out += Σ_j weights[j] · rows[j], one addition after the other: the same bits however rows are grouped in calls.
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

// Operands of one lookup. Cores cut a row into slices with weights of their own; blocks are where slots are pooled.
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
};

// Raise IndexError unless all entries in [first, last) lie in [0, bound). Compared as unsigned: negative ones are huge.
template <class Index>
inline void check_range(const Index* values, int64_t first, int64_t last, int64_t bound, const char* what) {
  uint64_t largest = 0;
  for (int64_t entry = first; entry < last; ++entry)
    largest = std::max(largest, static_cast<uint64_t>(static_cast<int64_t>(values[entry])));
  TORCH_CHECK_INDEX(first >= last || largest < static_cast<uint64_t>(bound), what, " of ", bound, ".");
}

template <class Index, class T>
inline void check_entries(const Lookup<Index, T>& lookup, int64_t first, int64_t last) {
  check_range(lookup.idx, first, last, lookup.num_rows, "an index is out of range: it lies outside the table, rows");
  if (lookup.block != nullptr)
    check_range(lookup.block, first, last, lookup.num_blocks, "a block is out of range: it is outside the blocks");
}

// out[block, c-th slice] += Σ w[entry, c] · row(entry) over `count` ≤ 4 entries from `entry` on.
template <class Index, class T>
inline void pool_entries(const Lookup<Index, T>& lookup, int64_t entry, int count, const float* weights, float* out) {
  const int64_t slice = lookup.slice(), cores = lookup.num_cores;
  const T* rows[4];
  for (int j = 0; j < count; ++j) rows[j] = lookup.row(entry + j);
  for (int64_t core = 0, start = 0; core < cores; ++core, start += slice) {
    if (count == 4 && lookup.block == nullptr) {
      const T* parts[4] = {rows[0] + start, rows[1] + start, rows[2] + start, rows[3] + start};
      add_rows<4>(out + start, parts, weights + core, cores, slice);
    } else {
      for (int j = 0; j < count; ++j) {
        const T* part = rows[j] + start;
        add_rows<1>(out + lookup.block_start(entry + j) + start, &part, weights + j * cores + core, cores, slice);
      }
    }
  }
}

}  // namespace ultramem
