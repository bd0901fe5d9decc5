// What a search compares and multiplies, 16 values at a time, with AVX-512 or as the compiler vectorises it.
//
// Floats are compared as integers of the same order in which NaN is the largest, as `torch.topk` has it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// In an unnamed namespace: included by one file.
namespace ultramem {
namespace {

constexpr int kBlock = 16;
constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();
constexpr int32_t kHighest = std::numeric_limits<int32_t>::max();

int padded(int64_t count) { return static_cast<int>((count + kBlock - 1) / kBlock * kBlock); }

// The float that an order key stands for; NaN for the highest.
float from_order_key(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & kHighest);
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

#if defined(__AVX512F__)

using Keys = __m512i;

__m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

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

// How many keys reach each of three bounds; the block after the last key must be the lowest of all.
std::array<int, 3> count_at_least(const int32_t* keys, int count, const std::array<int32_t, 3>& bounds) {
  const Keys first = _mm512_set1_epi32(bounds[0]), second = _mm512_set1_epi32(bounds[1]);
  const Keys third = _mm512_set1_epi32(bounds[2]);
  std::array<int, 3> totals{};
  for (int i = 0; i < count; i += kBlock) {
    const Keys block = _mm512_loadu_si512(keys + i);
    totals[0] += __builtin_popcount(_mm512_cmpge_epi32_mask(block, first));
    totals[1] += __builtin_popcount(_mm512_cmpge_epi32_mask(block, second));
    totals[2] += __builtin_popcount(_mm512_cmpge_epi32_mask(block, third));
  }
  return totals;
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

// Order keys and positions of some of a row's values, the `top` largest (or smallest) among them.
int shortlist(const float* values, int count, int top, bool smallest, int32_t* keys, int32_t* items) {
  const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi32(smallest ? kLowest : 0));
  // Lane-wise maxima of interleaved groups of blocks are different values of the row: all `top` reach the least.
  const int num_maxima = padded(top) / kBlock;
  float bound = -std::numeric_limits<float>::infinity();
  if (num_maxima <= 8 && num_maxima <= count / kBlock) {
    __m512 maxima[8];
    std::fill(maxima, maxima + 8, _mm512_set1_ps(bound));
    __mmask16 unordered = 0;
    for (int i = 0, group = 0; i + kBlock <= count; i += kBlock) {
      const __m512 block = _mm512_xor_ps(_mm512_loadu_ps(values + i), sign);
      unordered |= _mm512_cmp_ps_mask(block, block, _CMP_UNORD_Q);
      maxima[group] = _mm512_max_ps(maxima[group], block);
      group = group + 1 == num_maxima ? 0 : group + 1;
    }
    for (int i = 1; i < num_maxima; ++i) maxima[0] = _mm512_min_ps(maxima[0], maxima[i]);
    if (!unordered) bound = _mm512_reduce_min_ps(maxima[0]);
  }
  const __m512 bounds = _mm512_set1_ps(bound);
  __m512i positions = lane_numbers();
  int kept = 0;
  for (int i = 0; i < count; i += kBlock) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m512 block = _mm512_maskz_loadu_ps(lanes, values + i);
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes, _mm512_xor_ps(block, sign), bounds, _CMP_NLT_UQ);
    if (mask) kept = append(keys, items, kept, mask, _mm512_castps_si512(block), positions);
    positions = _mm512_add_epi32(positions, _mm512_set1_epi32(kBlock));
  }
  const Keys negate = _mm512_set1_epi32(smallest ? -1 : 0);
  for (int i = 0; i < kept; i += kBlock) {
    const __m512 block = _mm512_castsi512_ps(_mm512_loadu_si512(keys + i));
    _mm512_storeu_si512(keys + i, _mm512_xor_si512(order_keys(block), negate));
  }
  return kept;
}

// Scores of one row key with every column key; those above `cut` are appended, all where it is NaN.
template <class Rank>
int filter_pairs(const float* row, const float* cols, int stride, Rank rank, int num_cols, int32_t item, float cut,
                 int32_t* keys, int32_t* items, int count) {
  const __m512 cuts = _mm512_set1_ps(cut);
  for (int j = 0; j < num_cols; j += kBlock) {
    __m512 score = _mm512_mul_ps(_mm512_set1_ps(row[0]), _mm512_loadu_ps(cols + j));
    for (int p = 1; p < rank; ++p) {
      score = _mm512_fmadd_ps(_mm512_set1_ps(row[p]), _mm512_loadu_ps(cols + p * stride + j), score);
    }
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(first_lanes(num_cols - j), score, cuts, _CMP_NLE_UQ);
    if (mask) {
      const __m512i block_items = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(item + j));
      count = append(keys, items, count, mask, order_keys(score), block_items);
    }
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

std::array<int, 3> count_at_least(const int32_t* keys, int count, const std::array<int32_t, 3>& bounds) {
  std::array<int, 3> totals{};
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < 3; ++j) totals[j] += keys[i] >= bounds[j];
  }
  return totals;
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

int shortlist(const float* values, int count, int, bool smallest, int32_t* keys, int32_t* items) {
  for (int i = 0; i < count; ++i) {
    keys[i] = order_key(values[i]) ^ (smallest ? -1 : 0);
    items[i] = i;
  }
  return count;
}

template <class Rank>
int filter_pairs(const float* row, const float* cols, int stride, Rank rank, int num_cols, int32_t item, float cut,
                 int32_t* keys, int32_t* items, int count) {
  for (int j = 0; j < num_cols; ++j) {
    float score = row[0] * cols[j];
    for (int p = 1; p < rank; ++p) score += row[p] * cols[p * stride + j];
    keys[count] = order_key(score);
    items[count] = item + j;
    count += !(score <= cut);
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

}  // namespace
}  // namespace ultramem
