// The search of a product-key grid, one token and head at a time in scratch memory that stays in the L1 cache.
//
// Each side's top m come from a cut, the m-th largest value found by bisection on counts, not from sorting a row. The
// m × m candidates stream past a buffer that holds the best so far: the grid is never in memory. Floats are compared as
// integers of the same order in which NaN is the largest, as `torch.topk` has it; of equal values the one that stands
// first wins. Every token is computed by one thread in one order: the result does not depend on their number.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ultramem {
namespace {

using at::Tensor;

constexpr int kBlock = 16;
constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();
constexpr int32_t kHighest = std::numeric_limits<int32_t>::max();
// Tokens of one partial sum of the core gradients: fixed, so that the sum does not depend on the threads.
constexpr int64_t kTokensPerSum = 64;

int padded(int64_t count) { return static_cast<int>((count + kBlock - 1) / kBlock * kBlock); }

// ---- comparisons in blocks of 16 ------------------------------------------------------------------------------------

#if defined(__AVX512F__)

using Keys = __m512i;

__mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << std::min(count, kBlock)) - 1); }

Keys order_keys(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(kHighest));
  return _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flip), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                               _mm512_set1_epi32(kHighest));
}

// Append the marked lanes; both buffers have room for a whole block.
int append(int32_t* keys, int32_t* items, int count, __mmask16 mask, Keys block_keys, __m512i block_items) {
  _mm512_storeu_si512(keys + count, _mm512_maskz_compress_epi32(mask, block_keys));
  _mm512_storeu_si512(items + count, _mm512_maskz_compress_epi32(mask, block_items));
  return count + __builtin_popcount(mask);
}

int count_at_least(const int32_t* keys, int count, int32_t bound) {
  const Keys bounds = _mm512_set1_epi32(bound);
  int total = 0;
  for (int i = 0; i < count; i += kBlock) {
    const __mmask16 lanes = first_lanes(count - i);
    total += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(lanes, _mm512_loadu_si512(keys + i), bounds));
  }
  return total;
}

std::pair<int32_t, int32_t> smallest_and_largest(const int32_t* keys, int count) {
  Keys low = _mm512_set1_epi32(kHighest), high = _mm512_set1_epi32(kLowest);
  for (int i = 0; i < count; i += kBlock) {
    const __mmask16 lanes = first_lanes(count - i);
    const Keys block = _mm512_loadu_si512(keys + i);
    low = _mm512_mask_min_epi32(low, lanes, low, block);
    high = _mm512_mask_max_epi32(high, lanes, high, block);
  }
  return {_mm512_reduce_min_epi32(low), _mm512_reduce_max_epi32(high)};
}

// Keep every key above `cut` and the first `num_ties` that equal it, in place and in order.
int keep_above(int32_t* keys, int32_t* items, int count, int32_t cut, int num_ties) {
  const Keys cuts = _mm512_set1_epi32(cut);
  int kept = 0;
  for (int i = 0; i < count; i += kBlock) {
    const __mmask16 lanes = first_lanes(count - i);
    const Keys block = _mm512_loadu_si512(keys + i);
    const __m512i block_items = _mm512_loadu_si512(items + i);
    __mmask16 mask = _mm512_mask_cmpgt_epi32_mask(lanes, block, cuts);
    if (num_ties > 0) {
      unsigned ties = _mm512_mask_cmpeq_epi32_mask(lanes, block, cuts);
      for (; ties && num_ties > 0; --num_ties, ties &= ties - 1) mask |= static_cast<__mmask16>(ties & -ties);
    }
    kept = append(keys, items, kept, mask, block, block_items);
  }
  return kept;
}

// Order keys of a row's values, negated in order for the smallest; returns a bound that at least `top` of them reach.
int32_t order_row(const float* values, int count, int top, bool smallest, int32_t* keys) {
  const int num_maxima = padded(top) / kBlock, num_full = count / kBlock;
  const Keys negate = _mm512_set1_epi32(smallest ? -1 : 0);
  const bool bounded = num_maxima <= num_full && num_maxima <= 8;
  // Lane-wise maxima of num_maxima interleaved groups of blocks: each is a different key of the row.
  Keys maxima[8];
  std::fill(maxima, maxima + 8, _mm512_set1_epi32(kLowest));
  int group = 0;
  for (int i = 0; i < count; i += kBlock) {
    const __m512 block = _mm512_maskz_loadu_ps(first_lanes(count - i), values + i);
    const Keys block_keys = _mm512_xor_si512(order_keys(block), negate);
    _mm512_storeu_si512(keys + i, block_keys);
    if (bounded && i + kBlock <= count) {
      maxima[group] = _mm512_max_epi32(maxima[group], block_keys);
      group = group + 1 == num_maxima ? 0 : group + 1;
    }
  }
  if (!bounded) return kLowest;
  Keys bound = maxima[0];
  for (int i = 1; i < num_maxima; ++i) bound = _mm512_min_epi32(bound, maxima[i]);
  return _mm512_reduce_min_epi32(bound);
}

// The keys that reach a bound, with their positions.
int collect(const int32_t* row_keys, int count, int32_t bound, int32_t* keys, int32_t* items) {
  const Keys bounds = _mm512_set1_epi32(bound);
  __m512i positions = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int kept = 0;
  for (int i = 0; i < count; i += kBlock) {
    const Keys block = _mm512_loadu_si512(row_keys + i);
    const __mmask16 mask = _mm512_mask_cmpge_epi32_mask(first_lanes(count - i), block, bounds);
    kept = append(keys, items, kept, mask, block, positions);
    positions = _mm512_add_epi32(positions, _mm512_set1_epi32(kBlock));
  }
  return kept;
}

// Scores of one row key with every column key; those above `cut` are appended.
int filter_pairs(const float* row, const float* cols, int stride, int rank, int num_cols, int32_t item, int32_t cut,
                 int32_t* keys, int32_t* items, int count) {
  const Keys cuts = _mm512_set1_epi32(cut);
  const __m512i lanes_item = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int j = 0; j < num_cols; j += kBlock) {
    __m512 score = _mm512_mul_ps(_mm512_set1_ps(row[0]), _mm512_loadu_ps(cols + j));
    for (int p = 1; p < rank; ++p) {
      score = _mm512_fmadd_ps(_mm512_set1_ps(row[p]), _mm512_loadu_ps(cols + p * stride + j), score);
    }
    const Keys block = order_keys(score);
    const __mmask16 mask = _mm512_mask_cmpgt_epi32_mask(first_lanes(num_cols - j), block, cuts);
    if (mask) count = append(keys, items, count, mask, block, _mm512_add_epi32(lanes_item, _mm512_set1_epi32(item + j)));
  }
  return count;
}

// The sums of 16 vectors, one to a lane.
__m512 lane_sums(__m512* v) {
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(v[2 * i]), high = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  // Each 128-bit quarter of v[i] now holds partial sums of vectors 4i … 4i + 3.
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x88), _mm512_shuffle_f32x4(v[2], v[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Dot products of one vector with the chosen rows of a matrix; `out` has room for whole blocks.
void dot_rows(const float* x, const float* matrix, int64_t row_stride, int width, const int32_t* rows, int num_rows,
              float* out) {
  for (int begin = 0; begin < num_rows; begin += kBlock) {
    const float* row[kBlock];
    for (int i = 0; i < kBlock; ++i) row[i] = matrix + rows[std::min(begin + i, num_rows - 1)] * row_stride;
    __m512 sums[kBlock];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int d = 0; d < width; d += kBlock) {
      const __mmask16 lanes = first_lanes(width - d);
      const __m512 part = _mm512_maskz_loadu_ps(lanes, x + d);
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; ++i) {
        sums[i] = _mm512_fmadd_ps(part, _mm512_maskz_loadu_ps(lanes, row[i] + d), sums[i]);
      }
    }
    _mm512_storeu_ps(out + begin, lane_sums(sums));
  }
}

// Ascending order of distinct numbers, by counting how many are smaller.
void sort_few(const uint64_t* values, int count, uint64_t* sorted) {
  for (int i = 0; i < count; ++i) {
    const __m512i value = _mm512_set1_epi64(static_cast<int64_t>(values[i]));
    int rank = 0;
    for (int j = 0; j < count; j += 8) {
      const auto lanes = static_cast<__mmask8>((1u << std::min(8, count - j)) - 1);
      rank += __builtin_popcount(
          _mm512_mask_cmplt_epu64_mask(lanes, _mm512_maskz_loadu_epi64(lanes, values + j), value));
    }
    sorted[rank] = values[i];
  }
}

#else  // Portable: the same steps one value at a time, for the compiler to vectorise.

int32_t order_key(float x) {
  if (x != x) return kHighest;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & kHighest);
}

int count_at_least(const int32_t* keys, int count, int32_t bound) {
  int total = 0;
  for (int i = 0; i < count; ++i) total += keys[i] >= bound;
  return total;
}

std::pair<int32_t, int32_t> smallest_and_largest(const int32_t* keys, int count) {
  int32_t low = kHighest, high = kLowest;
  for (int i = 0; i < count; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  return {low, high};
}

int keep_above(int32_t* keys, int32_t* items, int count, int32_t cut, int num_ties) {
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    const bool tie = keys[i] == cut && num_ties > 0;
    num_ties -= tie;
    const int32_t key = keys[i], item = items[i];
    keys[kept] = key;
    items[kept] = item;
    kept += tie || key > cut;
  }
  return kept;
}

int32_t order_row(const float* values, int count, int top, bool smallest, int32_t* keys) {
  constexpr int kMaxima = 128;
  const int num_maxima = padded(top);
  const bool bounded = num_maxima <= count && num_maxima <= kMaxima;
  for (int i = 0; i < count; ++i) keys[i] = order_key(values[i]) ^ (smallest ? -1 : 0);
  if (!bounded) return kLowest;
  int32_t maxima[kMaxima];
  std::fill(maxima, maxima + num_maxima, kLowest);
  for (int begin = 0; begin < count; begin += num_maxima) {
    const int end = std::min(num_maxima, count - begin);
    for (int i = 0; i < end; ++i) maxima[i] = std::max(maxima[i], keys[begin + i]);
  }
  return *std::min_element(maxima, maxima + num_maxima);
}

int collect(const int32_t* row_keys, int count, int32_t bound, int32_t* keys, int32_t* items) {
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    keys[kept] = row_keys[i];
    items[kept] = i;
    kept += row_keys[i] >= bound;
  }
  return kept;
}

int filter_pairs(const float* row, const float* cols, int stride, int rank, int num_cols, int32_t item, int32_t cut,
                 int32_t* keys, int32_t* items, int count) {
  for (int j = 0; j < num_cols; ++j) {
    float score = row[0] * cols[j];
    for (int p = 1; p < rank; ++p) score += row[p] * cols[p * stride + j];
    keys[count] = order_key(score);
    items[count] = item + j;
    count += keys[count] > cut;
  }
  return count;
}

void dot_rows(const float* x, const float* matrix, int64_t row_stride, int width, const int32_t* rows, int num_rows,
              float* out) {
  for (int i = 0; i < num_rows; ++i) {
    const float* row = matrix + rows[i] * row_stride;
    float sums[kBlock] = {};
    int d = 0;
    for (; d + kBlock <= width; d += kBlock) {
      for (int lane = 0; lane < kBlock; ++lane) sums[lane] += x[d + lane] * row[d + lane];
    }
    for (; d < width; ++d) sums[0] += x[d] * row[d];
    out[i] = std::accumulate(sums, sums + kBlock, 0.0f);
  }
}

void sort_few(const uint64_t* values, int count, uint64_t* sorted) {
  std::copy(values, values + count, sorted);
  std::sort(sorted, sorted + count);
}

#endif

// ---- selection ------------------------------------------------------------------------------------------------------

// Keys by which values are compared, with what they stand for; `capacity` leaves room for a block of appended lanes.
struct Buffer {
  explicit Buffer(int64_t capacity) : keys(padded(capacity) + kBlock), items(padded(capacity) + kBlock) {}

  // Keep the `top` largest in order, the first of equal ones; returns the smallest that was kept.
  int32_t prune(int top) {
    auto [low, high] = smallest_and_largest(keys.data(), count);
    if (count <= top) return low;
    // Invariant: at least `top` keys are ≥ low, fewer than `top` are ≥ high.
    int64_t lower = low, upper = static_cast<int64_t>(high) + 1;
    int num_above = 0;
    while (upper - lower > 1) {
      const int64_t middle = lower + (upper - lower) / 2;
      const int reached = count_at_least(keys.data(), count, static_cast<int32_t>(middle));
      if (reached == top) {
        count = keep_above(keys.data(), items.data(), count, static_cast<int32_t>(middle - 1), 0);
        return static_cast<int32_t>(middle);
      }
      if (reached > top) {
        lower = middle;
      } else {
        upper = middle;
        num_above = reached;
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
      : sizes_(sizes), stride_(padded(sizes.coarse_top_k) + kBlock), row_keys_(padded(sizes.side)), line_(sizes.side),
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
      const int32_t bound = order_row(coarse, sizes_.side, top, quadrant == 1, row_keys_.data());
      Buffer& buffer = row_buffer();
      buffer.count = collect(row_keys_.data(), sizes_.side, bound, buffer.keys.data(), buffer.items.data());
      buffer.prune(top);
      std::copy_n(buffer.items.data(), top, candidates[side].data() + begin);
      begin += top;
    }
  }

  // Coarse scores of one side from all its fine ones [S, r].
  const float* contract(const float* scores, const float* direction) {
    switch (sizes_.rank) {  // ranks in use, unrolled
      case 1: return contract_rank<1>(scores, direction);
      case 2: return contract_rank<2>(scores, direction);
      case 4: return contract_rank<4>(scores, direction);
      default: return contract_rank<0>(scores, direction);
    }
  }

  float* fine_scores(int side, int rank) { return fine[side].data() + rank * stride_; }

  // Select the best pairs of the candidates by the cores' sum [r, r]; `core` is null for additive scores.
  void search(const float* core) {
    const int rank = sizes_.grid_rank();
    int32_t cut = kLowest;
    best_.count = 0;
    for (int quadrant = 0, begin = 0; quadrant < sizes_.num_quadrants(); ++quadrant) {
      const int size = sizes_.quadrant(quadrant);
      for (int i = begin; i < begin + size; ++i) {
        for (int p = 0; p < rank; ++p) {
          mixed_[p] = core == nullptr ? fine_scores(0, p)[i] : 0;
          for (int q = 0; core != nullptr && q < rank; ++q) mixed_[p] += fine_scores(0, q)[i] * core[q * rank + p];
        }
        best_.count = filter_pairs(mixed_.data(), fine_scores(1, 0) + begin, stride_, rank, size,
                                   i * sizes_.coarse_top_k + begin, cut, best_.keys.data(), best_.items.data(),
                                   best_.count);
        if (best_.count > sizes_.top_k + 3 * stride_) cut = best_.prune(sizes_.top_k);
      }
      begin += size;
    }
    best_.prune(sizes_.top_k);
    sort();
  }

  // The positions among the candidates of the k-th best pair.
  std::pair<int, int> pair(int k) const {
    const auto item = static_cast<uint32_t>(sorted_[k]);
    return {static_cast<int>(item / sizes_.coarse_top_k), static_cast<int>(item % sizes_.coarse_top_k)};
  }

  // Write the selected slots, their scores per core [K, C] (cores [C] apart by `core_stride`) and, where asked for, the
  // fine scores of both their keys [K, 2, r].
  void write(const float* cores, int64_t core_stride, int64_t* slots, float* scores, float* fine_out) {
    const int rank = sizes_.rank;
    for (int k = 0; k < sizes_.top_k; ++k) {
      const auto [i, j] = pair(k);
      slots[k] = static_cast<int64_t>(candidates[0][i]) * sizes_.side + candidates[1][j];
      if (sizes_.additive) scores[k] = fine_scores(0, 0)[i] + fine_scores(1, 1)[j];
      for (int c = 0; !sizes_.additive && c < sizes_.num_cores; ++c) {
        float total = 0;
        for (int p = 0; p < rank; ++p) {
          float sum = 0;
          for (int q = 0; q < rank; ++q) sum += fine_scores(0, q)[i] * cores[c * core_stride + q * rank + p];
          total += sum * fine_scores(1, p)[j];
        }
        scores[k * sizes_.num_cores + c] = total;
      }
      for (int p = 0; fine_out != nullptr && p < rank; ++p) {
        fine_out[(2 * k) * rank + p] = fine_scores(0, p)[i];
        fine_out[(2 * k + 1) * rank + p] = fine_scores(1, p)[j];
      }
    }
  }

  std::vector<int32_t> candidates[2];
  std::vector<float> fine[2];

 private:
  // The grid's buffer is idle while a side is chosen, but may be shorter than a side.
  Buffer& row_buffer() {
    if (static_cast<int>(best_.keys.size()) < padded(sizes_.side) + kBlock) {
      best_.keys.resize(padded(sizes_.side) + kBlock);
      best_.items.resize(padded(sizes_.side) + kBlock);
    }
    return best_;
  }

  template <int kRank>
  const float* contract_rank(const float* __restrict scores, const float* __restrict direction) {
    const int rank = kRank ? kRank : sizes_.rank;
    float* __restrict line = line_.data();
    for (int s = 0; s < sizes_.side; ++s) {
      float sum = 0;
      for (int p = 0; p < rank; ++p) sum += scores[s * rank + p] * direction[p];
      line[s] = sum;
    }
    return line;
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
  std::vector<int32_t> row_keys_;
  std::vector<float> line_;
  Buffer best_;
  std::vector<uint64_t> pairs_, sorted_;
  std::vector<float> mixed_;
};

Tensor plain(const Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

const float* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// ---- operators ------------------------------------------------------------------------------------------------------

// `product_topk` from the fine scores of every key [N, H, S, r].
std::tuple<Tensor, Tensor> product_topk(const Tensor& rows, const Tensor& cols, const std::optional<Tensor>& cores,
                                        const std::optional<Tensor>& row_direction,
                                        const std::optional<Tensor>& col_direction, int64_t top_k, int64_t coarse_top_k,
                                        bool is_signed) {
  const int64_t num_tokens = rows.size(0), num_heads = rows.size(1), side = rows.size(2), rank = rows.size(3);
  const bool additive = !cores.has_value();
  const int64_t num_cores = additive ? 1 : cores->size(0);
  const Sizes sizes{static_cast<int>(side), static_cast<int>(rank), static_cast<int>(num_cores), static_cast<int>(top_k),
                    static_cast<int>(coarse_top_k), is_signed, additive};
  const Tensor sides[2] = {plain(rows), plain(cols)};
  std::optional<Tensor> all_cores, core_sum, directions[2];
  if (!additive) {
    all_cores = plain(*cores);
    core_sum = all_cores->sum(0).contiguous();
    directions[0] = plain(*row_direction);
    directions[1] = plain(*col_direction);
  }
  Tensor scores = at::empty({num_tokens, num_heads, top_k, num_cores}, rows.options().dtype(at::kFloat));
  Tensor slots = at::empty({num_tokens, num_heads, top_k}, rows.options().dtype(at::kLong));
  auto* slots_out = slots.mutable_data_ptr<int64_t>();
  auto* scores_out = scores.mutable_data_ptr<float>();
  at::parallel_for(0, num_tokens * num_heads, 4, [&](int64_t begin, int64_t end) {
    GridSearch search(sizes);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t head = n % num_heads;
      for (int s : {0, 1}) {
        const float* fine = sides[s].const_data_ptr<float>() + n * side * rank;
        search.choose(s, additive ? fine : search.contract(fine, data(directions[s]) + head * rank));
        for (int p = 0; p < rank; ++p) {
          float* out = search.fine_scores(s, additive ? s : p);
          for (int i = 0; i < coarse_top_k; ++i) out[i] = fine[search.candidates[s][i] * rank + p];
        }
      }
      search.search(additive ? nullptr : data(core_sum) + head * rank * rank);
      search.write(additive ? nullptr : data(all_cores) + head * rank * rank, num_heads * rank * rank,
                   slots_out + n * top_k, scores_out + n * top_k * num_cores, nullptr);
    }
  });
  return {scores, slots};
}

// The search from keys: coarse scores [2, N, H, S] choose, and only the chosen keys [H, 2, S, r, d] meet the queries
// [N, 2, Q, d]. Also returns the fine scores of the selected keys [N, H, K, 2, r], which the gradients need.
std::tuple<Tensor, Tensor, Tensor> key_search(const Tensor& query, const Tensor& keys, const Tensor& coarse,
                                              const Tensor& cores, int64_t top_k, int64_t coarse_top_k, bool is_signed) {
  const int64_t num_tokens = query.size(0), num_queries = query.size(2), width = query.size(3);
  const int64_t num_heads = keys.size(0), side = keys.size(2), rank = keys.size(3), num_cores = cores.size(0);
  const Sizes sizes{static_cast<int>(side), static_cast<int>(rank), static_cast<int>(num_cores), static_cast<int>(top_k),
                    static_cast<int>(coarse_top_k), is_signed, false};
  const Tensor core_sum = cores.sum(0).contiguous();
  Tensor scores = at::empty({num_tokens, num_heads, top_k, num_cores}, query.options());
  Tensor slots = at::empty({num_tokens, num_heads, top_k}, query.options().dtype(at::kLong));
  Tensor fine = at::empty({num_tokens, num_heads, top_k, 2, rank}, query.options());
  const float *query_data = query.const_data_ptr<float>(), *key_data = keys.const_data_ptr<float>();
  const float *coarse_data = coarse.const_data_ptr<float>(), *core_data = cores.const_data_ptr<float>();
  const float* sum_data = core_sum.const_data_ptr<float>();
  auto *slots_out = slots.mutable_data_ptr<int64_t>();
  auto *scores_out = scores.mutable_data_ptr<float>(), *fine_out = fine.mutable_data_ptr<float>();
  at::parallel_for(0, num_tokens * num_heads, 4, [&](int64_t begin, int64_t end) {
    GridSearch search(sizes);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t token = n / num_heads, head = n % num_heads;
      for (int64_t s : {0, 1}) {
        search.choose(s, coarse_data + ((s * num_tokens + token) * num_heads + head) * side);
        for (int64_t p = 0; p < rank; ++p) {
          const float* x = query_data + ((token * 2 + s) * num_queries + (num_queries == 1 ? 0 : p)) * width;
          const float* matrix = key_data + ((head * 2 + s) * side * rank + p) * width;
          dot_rows(x, matrix, rank * width, width, search.candidates[s].data(), coarse_top_k, search.fine_scores(s, p));
        }
      }
      search.search(sum_data + head * rank * rank);
      search.write(core_data + head * rank * rank, num_heads * rank * rank, slots_out + n * top_k,
                   scores_out + n * top_k * num_cores, fine_out + n * top_k * 2 * rank);
    }
  });
  return {scores, slots, fine};
}

// The gradient of one token's fine scores, summed over the slots that share a key.
struct KeyGradients {
  KeyGradients(int64_t side, int64_t top_k, int64_t rank) : place(side, -1), rows(top_k), values(top_k * rank) {}

  void add(int32_t row, const float* gradient, int64_t rank) {
    if (place[row] < 0) {
      place[row] = count;
      rows[count] = row;
      std::fill_n(values.data() + count * rank, rank, 0.0f);
      ++count;
    }
    float* sum = values.data() + place[row] * rank;
    for (int64_t p = 0; p < rank; ++p) sum[p] += gradient[p];
  }

  void clear() {
    for (int32_t i = 0; i < count; ++i) place[rows[i]] = -1;
    count = 0;
  }

  std::vector<int32_t> place, rows;
  std::vector<float> values;
  int32_t count = 0;
};

void add_scaled(float* __restrict out, const float* __restrict x, float scale, int64_t width) {
  for (int64_t d = 0; d < width; ++d) out[d] += scale * x[d];
}

// Gradients of queries, keys and cores from those of the selected scores [N, H, K, C].
std::tuple<Tensor, Tensor, Tensor> key_search_backward(const Tensor& grad_scores, const Tensor& slots, const Tensor& fine,
                                                       const Tensor& query, const Tensor& keys, const Tensor& cores) {
  const int64_t num_tokens = query.size(0), num_queries = query.size(2), width = query.size(3);
  const int64_t num_heads = keys.size(0), side = keys.size(2), rank = keys.size(3), num_cores = cores.size(0);
  const int64_t top_k = slots.size(2), num_sums = (num_tokens + kTokensPerSum - 1) / kTokensPerSum;
  const int64_t core_size = num_heads * rank * rank;
  Tensor grad_query = at::zeros_like(query), grad_keys = at::empty_like(keys);
  // Per token, head and side: the selected keys and the gradients of their fine scores.
  Tensor rows = at::empty({num_heads, 2, num_tokens, top_k}, query.options().dtype(at::kInt));
  Tensor values = at::empty({num_heads, 2, num_tokens, top_k, rank}, query.options());
  Tensor counts = at::empty({num_heads, 2, num_tokens}, query.options().dtype(at::kInt));
  Tensor core_sums = at::zeros({num_sums, num_cores * core_size}, query.options());
  const float *grad = grad_scores.const_data_ptr<float>(), *fine_data = fine.const_data_ptr<float>();
  const float *query_data = query.const_data_ptr<float>(), *key_data = keys.const_data_ptr<float>();
  const float* core_data = cores.const_data_ptr<float>();
  const int64_t* slot_data = slots.const_data_ptr<int64_t>();
  float *grad_query_out = grad_query.mutable_data_ptr<float>(), *grad_keys_out = grad_keys.mutable_data_ptr<float>();
  float *values_out = values.mutable_data_ptr<float>(), *sums_out = core_sums.mutable_data_ptr<float>();
  auto *rows_out = rows.mutable_data_ptr<int32_t>(), *counts_out = counts.mutable_data_ptr<int32_t>();

  at::parallel_for(0, num_sums, 1, [&](int64_t begin, int64_t end) {
    KeyGradients gradients[2] = {{side, top_k, rank}, {side, top_k, rank}};
    std::vector<float> weighted(rank * rank), left(rank), right(rank);
    for (int64_t n = begin * kTokensPerSum; n < std::min(end * kTokensPerSum, num_tokens); ++n) {
      float* core_sum = sums_out + n / kTokensPerSum * num_cores * core_size;
      for (int64_t head = 0; head < num_heads; ++head) {
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t slot = (n * num_heads + head) * top_k + k;
          const float *row = fine_data + slot * 2 * rank, *col = row + rank;
          std::fill(weighted.begin(), weighted.end(), 0.0f);
          for (int64_t c = 0; c < num_cores; ++c) {
            const float g = grad[slot * num_cores + c];
            const int64_t at = (c * num_heads + head) * rank * rank;
            for (int64_t p = 0; p < rank; ++p) {
              for (int64_t q = 0; q < rank; ++q) {
                weighted[p * rank + q] += g * core_data[at + p * rank + q];
                core_sum[at + p * rank + q] += g * row[p] * col[q];
              }
            }
          }
          std::fill(right.begin(), right.end(), 0.0f);
          for (int64_t p = 0; p < rank; ++p) {
            left[p] = 0;
            for (int64_t q = 0; q < rank; ++q) {
              left[p] += weighted[p * rank + q] * col[q];
              right[q] += weighted[p * rank + q] * row[p];
            }
          }
          gradients[0].add(static_cast<int32_t>(slot_data[slot] / side), left.data(), rank);
          gradients[1].add(static_cast<int32_t>(slot_data[slot] % side), right.data(), rank);
        }
        for (int64_t s : {0, 1}) {
          KeyGradients& of_side = gradients[s];
          const int64_t at = (head * 2 + s) * num_tokens + n;
          counts_out[at] = of_side.count;
          std::copy_n(of_side.rows.data(), of_side.count, rows_out + at * top_k);
          std::copy_n(of_side.values.data(), of_side.count * rank, values_out + at * top_k * rank);
          for (int32_t i = 0; i < of_side.count; ++i) {
            const float* key = key_data + ((head * 2 + s) * side + of_side.rows[i]) * rank * width;
            for (int64_t p = 0; p < rank; ++p) {
              float* out = grad_query_out + ((n * 2 + s) * num_queries + (num_queries == 1 ? 0 : p)) * width;
              add_scaled(out, key + p * width, of_side.values[i * rank + p], width);
            }
          }
          of_side.clear();
        }
      }
    }
  });

  // Sorted by key and, within a key, by token, every key's gradient is one sum in one order.
  Tensor order = at::empty({num_heads * 2, num_tokens * top_k}, query.options().dtype(at::kLong));
  Tensor starts = at::zeros({num_heads * 2, side + 1}, query.options().dtype(at::kLong));
  auto *order_out = order.mutable_data_ptr<int64_t>(), *starts_out = starts.mutable_data_ptr<int64_t>();
  at::parallel_for(0, num_heads * 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      int64_t* start = starts_out + s * (side + 1);
      for (int64_t n = 0; n < num_tokens; ++n) {
        const int32_t* row = rows_out + (s * num_tokens + n) * top_k;
        for (int32_t i = 0; i < counts_out[s * num_tokens + n]; ++i) ++start[row[i] + 1];
      }
      std::partial_sum(start, start + side + 1, start);
      std::vector<int64_t> next(start, start + side);
      for (int64_t n = 0; n < num_tokens; ++n) {
        const int32_t* row = rows_out + (s * num_tokens + n) * top_k;
        for (int32_t i = 0; i < counts_out[s * num_tokens + n]; ++i) {
          order_out[s * num_tokens * top_k + next[row[i]]++] = n * top_k + i;
        }
      }
    }
  });
  at::parallel_for(0, num_heads * 2 * side, 16, [&](int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; ++key) {
      const int64_t s = key / side, row = key % side;
      float* out = grad_keys_out + key * rank * width;
      std::fill_n(out, rank * width, 0.0f);
      for (int64_t i = starts_out[s * (side + 1) + row]; i < starts_out[s * (side + 1) + row + 1]; ++i) {
        const int64_t entry = order_out[s * num_tokens * top_k + i], n = entry / top_k;
        const float* value = values_out + (s * num_tokens * top_k + entry) * rank;
        for (int64_t p = 0; p < rank; ++p) {
          const float* x = query_data + ((n * 2 + s % 2) * num_queries + (num_queries == 1 ? 0 : p)) * width;
          add_scaled(out + p * width, x, value[p], width);
        }
      }
    }
  });
  return {grad_query, grad_keys, core_sums.sum(0).view(cores.sizes())};
}

}  // namespace
}  // namespace ultramem

TORCH_LIBRARY_FRAGMENT(ultramem_cpu, library) {
  library.def("product_topk", &ultramem::product_topk);
  library.def("key_search", &ultramem::key_search);
  library.def("key_search_backward", &ultramem::key_search_backward);
}
