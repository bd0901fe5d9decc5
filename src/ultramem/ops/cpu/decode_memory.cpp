// The memory of one decode step: from the normed hidden states of a few tokens to what the residual stream gains.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "decode.h"
#include "kernels.h"
#include "product.h"

namespace ultramem {
namespace {

// Rows of the pool behind the grid's slots, and the virtual block of each.
void find_rows(const at::Tensor& slots, const at::Tensor& permutation, int64_t window_offset, int64_t window_size,
               int64_t num_rows, int64_t* rows, int64_t* blocks) {
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int32_t* permuted = permutation.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < slots.numel(); ++i) {
    const int64_t virtual_slot = permuted[slot[i]], block = virtual_slot / window_size;
    const int64_t row = virtual_slot - block * window_size + window_offset;
    rows[i] = row < num_rows ? row : row % num_rows;
    blocks[i] = block;
  }
}

}  // namespace

void add_tucker_memory(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& query_weight,
                       const at::Tensor& query_gain, double epsilon, const at::Tensor& keys,
                       const at::Tensor& contracted, const at::Tensor& cores, int64_t top_k, int64_t coarse_top_k,
                       bool is_signed, const at::Tensor& permutation, int64_t window_offset, int64_t window_size,
                       const at::Tensor& values, const std::optional<at::Tensor>& pre_values,
                       const std::optional<at::Tensor>& pre_weight, std::string_view activation, int64_t num_blocks,
                       const at::Tensor& out_weight) {
  const int64_t num_tokens = x.size(0), query_width = query_weight.size(0), key_width = query_gain.size(0);
  const int64_t num_queries = query_width / (2 * key_width);
  const at::Tensor query = at::empty({num_tokens, 2, num_queries, key_width}, x.options());
  const at::Tensor pre = pre_weight ? at::empty({num_tokens, pre_weight->size(0)}, x.options()) : at::Tensor();
  float* queries = query.mutable_data_ptr<float>();
  with_float_type(query_weight, [&](auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const Activations inputs(x.const_data_ptr<float>(), num_tokens, x.size(1));
    std::vector<Matrix<T>> projections{matrix_of<T>(query_weight, {}, queries, query_width, false)};
    if (pre_weight)
      projections.push_back(matrix_of<T>(*pre_weight, {}, pre.mutable_data_ptr<float>(), pre.size(1), false));
    multiply<T>(inputs, projections);
    const T* gain = static_cast<const T*>(query_gain.const_data_ptr());
    for (int64_t i = 0; i < num_tokens * 2 * num_queries; ++i)
      normalize(queries + i * key_width, gain, key_width, static_cast<float>(epsilon), queries + i * key_width);
  });
  const auto [scores, slots, fine] =
      key_search(query, keys, contracted, cores.to(at::kFloat), top_k, coarse_top_k, is_signed);
  const at::Tensor rows = at::empty({num_tokens, slots.size(1) * slots.size(2)}, slots.options());
  const at::Tensor blocks = at::empty_like(rows);
  find_rows(slots, permutation, window_offset, window_size, values.size(0), rows.mutable_data_ptr<int64_t>(),
            blocks.mutable_data_ptr<int64_t>());
  const at::Tensor weights = scores.flatten(1, 2);
  const std::optional<at::Tensor> block = num_blocks > 1 ? std::make_optional(blocks) : std::nullopt;
  const at::Tensor pooled = pre_values
                                ? pooled_read(rows, weights, values, pre, *pre_values, activation, block, num_blocks)
                                : bag(rows, weights, values, block, num_blocks);
  const at::Tensor pooled_fp32 = pooled.to(at::kFloat);
  with_float_type(out_weight, [&](auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const Activations outputs(pooled_fp32.const_data_ptr<float>(), num_tokens, pooled_fp32.size(1));
    multiply<T>(outputs, {matrix_of<T>(out_weight, {}, residual.mutable_data_ptr<float>(), residual.size(1), true)});
  });
}

}  // namespace ultramem
