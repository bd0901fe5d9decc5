// Gradients of the search from keys: only the selected slots carry any.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace ultramem {
namespace {

using at::Tensor;

// Tokens of one partial sum of the core gradients: fixed, so that the sum does not depend on the threads.
constexpr int64_t kTokensPerSum = 64;

// The gradient of one token's fine scores, summed over the slots that share a key.
struct KeyGradients {
  KeyGradients(int64_t side, int64_t top_k, int64_t rank) : place(side, -1), rows(top_k), values(top_k * rank) {}

  template <class Rank>
  void add(int32_t row, const float* gradient, Rank rank) {
    if (place[row] < 0) {
      place[row] = count;
      rows[count] = row;
      std::fill_n(values.data() + count * rank, rank, 0.0f);
      ++count;
    }
    float* sum = values.data() + place[row] * rank;
    for (int p = 0; p < rank; ++p) sum[p] += gradient[p];
  }

  void clear() {
    for (int32_t i = 0; i < count; ++i) place[rows[i]] = -1;
    count = 0;
  }

  std::vector<int32_t> place, rows;
  std::vector<float> values;
  int32_t count = 0;
};

// out += Σ_j weights[j · stride] · rows[j], for up to kRowsAtOnce rows.
void add_few_rows(float* out, const float* const* rows, int64_t count, const float* weights, int64_t stride,
                  int64_t width) {
  if (count == kRowsAtOnce) return add_rows<kRowsAtOnce>(out, rows, weights, stride, width);
  for (int64_t j = 0; j < count; ++j) add_rows<1>(out, rows + j, weights + j * stride, stride, width);
}

}  // namespace

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
        with_rank(rank, [&](auto rank) {
          for (int64_t k = 0; k < top_k; ++k) {
            const int64_t slot = (n * num_heads + head) * top_k + k;
            const float *row = fine_data + slot * 2 * rank, *col = row + rank;
            std::fill(weighted.begin(), weighted.end(), 0.0f);
            for (int64_t c = 0; c < num_cores; ++c) {
              const float g = grad[slot * num_cores + c];
              const int64_t at = (c * num_heads + head) * rank * rank;
              for (int p = 0; p < rank; ++p) {
                for (int q = 0; q < rank; ++q) {
                  weighted[p * rank + q] += g * core_data[at + p * rank + q];
                  core_sum[at + p * rank + q] += g * row[p] * col[q];
                }
              }
            }
            for (int p = 0; p < rank; ++p) {
              left[p] = right[p] = 0;
              for (int q = 0; q < rank; ++q) {
                left[p] += weighted[p * rank + q] * col[q];
                right[p] += weighted[q * rank + p] * row[q];
              }
            }
            gradients[0].add(static_cast<int32_t>(slot_data[slot] / side), left.data(), rank);
            gradients[1].add(static_cast<int32_t>(slot_data[slot] % side), right.data(), rank);
          }
        });
        for (int64_t s : {0, 1}) {
          KeyGradients& of_side = gradients[s];
          const int64_t at = (head * 2 + s) * num_tokens + n;
          counts_out[at] = of_side.count;
          std::copy_n(of_side.rows.data(), of_side.count, rows_out + at * top_k);
          std::copy_n(of_side.values.data(), of_side.count * rank, values_out + at * top_k * rank);
          for (int32_t i = 0; i < of_side.count; i += kRowsAtOnce) {
            const int64_t together = std::min<int64_t>(kRowsAtOnce, of_side.count - i);
            for (int64_t p = 0; p < rank; ++p) {
              const float* rows_of_rank[kRowsAtOnce];
              for (int64_t j = 0; j < together; ++j)
                rows_of_rank[j] = key_data + (((head * 2 + s) * side + of_side.rows[i + j]) * rank + p) * width;
              float* out = grad_query_out + ((n * 2 + s) * num_queries + (num_queries == 1 ? 0 : p)) * width;
              add_few_rows(out, rows_of_rank, together, of_side.values.data() + i * rank + p, rank, width);
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
      const int64_t last = starts_out[s * (side + 1) + row + 1];
      for (int64_t i = starts_out[s * (side + 1) + row]; i < last; i += kRowsAtOnce) {
        const int64_t together = std::min<int64_t>(kRowsAtOnce, last - i);
        const int64_t* entries = order_out + s * num_tokens * top_k + i;
        for (int64_t p = 0; p < rank; ++p) {
          const float* queries[kRowsAtOnce];
          float weights[kRowsAtOnce];
          for (int64_t j = 0; j < together; ++j) {
            const int64_t n = entries[j] / top_k;
            queries[j] = query_data + ((n * 2 + s % 2) * num_queries + (num_queries == 1 ? 0 : p)) * width;
            weights[j] = values_out[(s * num_tokens * top_k + entries[j]) * rank + p];
          }
          add_few_rows(out + p * width, queries, together, weights, 1, width);
        }
      }
    }
  });
  return {grad_query, grad_keys, core_sums.sum(0).view(cores.sizes())};
}

}  // namespace ultramem
