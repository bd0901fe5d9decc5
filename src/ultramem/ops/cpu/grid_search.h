// The search of a product-key grid for one token and head, in scratch memory that stays in the L1 cache.
//
// Each side's top m come from a cut, the m-th largest value found by bisection on counts, not from sorting a row. The
// m × m candidates stream past a buffer that holds the best so far: the grid is never in memory. Of equal values the
// one that stands first wins.
#pragma once

#include <vector>

#include "blocks.h"
#include "common.h"

namespace ultramem {
namespace {

// The largest m that fits the positions of a pair into one number.
constexpr int kMostCandidates = 1 << 15;

// Keys by which values are compared, with what they stand for; `capacity` leaves room for a block of appended lanes.
struct Buffer {
  explicit Buffer(int64_t capacity) : keys(padded(capacity) + kBlock), items(padded(capacity) + kBlock) {}

  // Keep the `top` largest in order, the first of equal ones; returns the smallest that was kept.
  int32_t prune(int top) {
    auto [low, high] = smallest_and_largest(keys.data(), count);
    if (count <= top) return low;
    std::fill_n(keys.data() + count, kBlock, kLowest);
    // Invariant: at least `top` keys are ≥ lower, fewer than `top` are ≥ upper. Three bounds at a time: fewer passes.
    int64_t lower = low, upper = static_cast<int64_t>(high) + 1;
    int num_above = 0;
    while (upper - lower > 1) {
      const int64_t quarter = std::max<int64_t>((upper - lower) / 4, 1);
      std::array<int32_t, 3> bounds;
      for (int i = 0; i < 3; ++i) bounds[i] = static_cast<int32_t>(std::min(lower + (i + 1) * quarter, upper - 1));
      const auto reached = count_at_least(keys.data(), count, bounds);
      for (int i = 0; i < 3; ++i) {
        if (reached[i] == top) {
          count = keep_above(keys.data(), items.data(), count, bounds[i] - 1, 0);
          return bounds[i];
        }
      }
      const int num_low = (reached[0] > top) + (reached[1] > top) + (reached[2] > top);
      if (num_low > 0) lower = bounds[num_low - 1];
      if (num_low < 3) {
        upper = bounds[num_low];
        num_above = reached[num_low];
      }
    }
    count = keep_above(keys.data(), items.data(), count, static_cast<int32_t>(lower), top - num_above);
    return static_cast<int32_t>(lower);
  }

  std::vector<int32_t> keys, items;
  int count = 0;
};

struct Sizes {
  int side, rank, num_cores, top_k, coarse_top_k;
  bool is_signed, additive;

  // Keys of one side in each quadrant of the search.
  int quadrant(int index) const { return index == 0 ? coarse_top_k - (is_signed ? coarse_top_k / 2 : 0) : coarse_top_k / 2; }
  int num_quadrants() const { return is_signed && coarse_top_k > 1 ? 2 : 1; }
  // Additive scores are a product of rank two: (row, 1) · (1, col).
  int grid_rank() const { return additive ? 2 : rank; }
};

// One thread's scratch memory: candidates of both sides with their fine scores by rank, and the best pairs so far.
class GridSearch {
 public:
  explicit GridSearch(const Sizes& sizes)
      : sizes_(sizes), stride_(padded(sizes.coarse_top_k) + kBlock), line_(sizes.side), line_keys_(sizes.side),
        best_(sizes.top_k + 4 * stride_), pairs_(sizes.top_k), sorted_(sizes.top_k), mixed_(sizes.grid_rank()) {
    for (int side : {0, 1}) {
      candidates[side].resize(stride_);
      fine[side].assign(sizes.grid_rank() * stride_, 1.0f);
    }
  }

  // The keys of one side that the coarse stage keeps, quadrant after quadrant, each in ascending order.
  void choose(int side, const float* coarse) {
    int begin = 0;
    for (int quadrant = 0; quadrant < sizes_.num_quadrants(); ++quadrant) {
      const int top = sizes_.quadrant(quadrant);
      line_keys_.count =
          shortlist(coarse, sizes_.side, top, quadrant == 1, line_keys_.keys.data(), line_keys_.items.data());
      line_keys_.prune(top);
      std::copy_n(line_keys_.items.data(), top, candidates[side].data() + begin);
      begin += top;
    }
  }

  // Coarse scores of one side from all its fine ones [S, r].
  const float* contract(const float* __restrict scores, const float* __restrict direction) {
    float* __restrict line = line_.data();
    with_rank(sizes_.rank, [&](auto rank) {
      for (int s = 0; s < sizes_.side; ++s) {
        float sum = 0;
        for (int p = 0; p < rank; ++p) sum += scores[s * rank + p] * direction[p];
        line[s] = sum;
      }
    });
    return line;
  }

  float* fine_scores(int side, int rank) { return fine[side].data() + rank * stride_; }

  // Select the best pairs of the candidates by the cores' sum [r, r]; `core` is null for additive scores.
  void search(const float* core) {
    with_rank(sizes_.grid_rank(), [&](auto rank) { search_pairs(core, rank); });
    best_.prune(sizes_.top_k);
    sort();
  }

  // The positions among the candidates of the k-th best pair.
  std::pair<int, int> pair(int k) const {
    const auto item = static_cast<uint32_t>(sorted_[k]);
    return {static_cast<int>(item >> 16), static_cast<int>(item & 0xffff)};
  }

  // Write the selected slots, their scores per core [K, C] (cores [C] apart by `core_stride`) and, where asked for, the
  // fine scores of both their keys [K, 2, r].
  void write(const float* cores, int64_t core_stride, int64_t* slots, float* scores, float* fine_out) {
    with_rank(sizes_.rank, [&](auto rank) { write_slots(cores, core_stride, slots, scores, fine_out, rank); });
  }

  std::vector<int32_t> candidates[2];
  std::vector<float> fine[2];

 private:
  template <class Rank>
  void search_pairs(const float* core, Rank rank) {
    const float *rows = fine_scores(0, 0), *cols = fine_scores(1, 0);
    float cut = std::numeric_limits<float>::quiet_NaN();
    best_.count = 0;
    for (int quadrant = 0, begin = 0; quadrant < sizes_.num_quadrants(); ++quadrant) {
      const int size = sizes_.quadrant(quadrant);
      for (int i = begin; i < begin + size; ++i) {
        for (int p = 0; p < rank; ++p) {
          float sum = core == nullptr ? rows[p * stride_ + i] : 0;
          for (int q = 0; core != nullptr && q < rank; ++q) sum += rows[q * stride_ + i] * core[q * rank + p];
          mixed_[p] = sum;
        }
        best_.count = filter_pairs(mixed_.data(), cols + begin, stride_, rank, size, (i << 16) + begin, cut,
                                   best_.keys.data(), best_.items.data(), best_.count);
        if (best_.count > sizes_.top_k + 3 * stride_) cut = from_order_key(best_.prune(sizes_.top_k));
      }
      begin += size;
    }
  }

  template <class Rank>
  void write_slots(const float* cores, int64_t core_stride, int64_t* slots, float* scores, float* fine_out, Rank rank) {
    const float *rows = fine_scores(0, 0), *cols = fine_scores(1, 0);
    for (int k = 0; k < sizes_.top_k; ++k) {
      const auto [i, j] = pair(k);
      slots[k] = static_cast<int64_t>(candidates[0][i]) * sizes_.side + candidates[1][j];
      if (sizes_.additive) scores[k] = rows[i] + cols[stride_ + j];
      for (int c = 0; !sizes_.additive && c < sizes_.num_cores; ++c) {
        float total = 0;
        for (int p = 0; p < rank; ++p) {
          float sum = 0;
          for (int q = 0; q < rank; ++q) sum += rows[q * stride_ + i] * cores[c * core_stride + q * rank + p];
          total += sum * cols[p * stride_ + j];
        }
        scores[k * sizes_.num_cores + c] = total;
      }
      for (int p = 0; fine_out != nullptr && p < rank; ++p) {
        fine_out[(2 * k) * rank + p] = rows[p * stride_ + i];
        fine_out[(2 * k + 1) * rank + p] = cols[p * stride_ + j];
      }
    }
  }

  void sort() {
    for (int k = 0; k < sizes_.top_k; ++k) {
      const uint32_t descending = ~(static_cast<uint32_t>(best_.keys[k]) ^ 0x80000000u);
      pairs_[k] = (static_cast<uint64_t>(descending) << 32) | static_cast<uint32_t>(best_.items[k]);
    }
    if (sizes_.top_k <= 96) {
      sort_few(pairs_.data(), sizes_.top_k, sorted_.data());
    } else {
      std::copy(pairs_.begin(), pairs_.end(), sorted_.begin());
      std::sort(sorted_.begin(), sorted_.end());
    }
  }

  Sizes sizes_;
  int stride_;
  std::vector<float> line_;
  Buffer line_keys_;
  Buffer best_;
  std::vector<uint64_t> pairs_, sorted_;
  std::vector<float> mixed_;
};

}  // namespace
}  // namespace ultramem
