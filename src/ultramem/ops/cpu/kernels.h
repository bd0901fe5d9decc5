// The kernels that bindings.cpp registers; what they compute is said where they are dispatched to, in ultramem/ops.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace ultramem {

at::Tensor gather_dot(const at::Tensor& idx, const at::Tensor& x, const at::Tensor& table,
                      const std::optional<at::Tensor>& block, int64_t num_blocks, int64_t num_cores);

at::Tensor bag(const at::Tensor& idx, const at::Tensor& w, const at::Tensor& table,
               const std::optional<at::Tensor>& block, int64_t num_blocks);

at::Tensor pooled_read(const at::Tensor& idx, const at::Tensor& scores, const at::Tensor& values, const at::Tensor& x,
                       const at::Tensor& pre_values, std::string_view activation,
                       const std::optional<at::Tensor>& block, int64_t num_blocks);

at::Tensor scatter(const at::Tensor& idx, const at::Tensor& w, const at::Tensor& x, int64_t num_rows,
                   const std::optional<at::Tensor>& block, int64_t num_blocks);

std::tuple<at::Tensor, at::Tensor> sum_rows(const std::vector<at::Tensor>& idx, const std::vector<at::Tensor>& w,
                                            const std::vector<at::Tensor>& x,
                                            const c10::List<std::optional<at::Tensor>>& block,
                                            const std::vector<int64_t>& num_blocks, int64_t num_rows, int64_t width);

// Ask the system to hold a large table in huge pages. Returns the bytes that it was asked for: 0 the second time.
int64_t keep_in_huge_pages(const at::Tensor& table);

std::tuple<at::Tensor, at::Tensor> product_topk(const at::Tensor& rows, const at::Tensor& cols,
                                                const std::optional<at::Tensor>& cores,
                                                const std::optional<at::Tensor>& row_direction,
                                                const std::optional<at::Tensor>& col_direction, int64_t top_k,
                                                int64_t coarse_top_k, bool is_signed);

std::tuple<at::Tensor, at::Tensor, at::Tensor> key_search(const at::Tensor& query, const at::Tensor& keys,
                                                          const at::Tensor& contracted, const at::Tensor& cores,
                                                          int64_t top_k, int64_t coarse_top_k, bool is_signed);

std::tuple<at::Tensor, at::Tensor, at::Tensor> key_search_backward(const at::Tensor& grad_scores,
                                                                   const at::Tensor& slots, const at::Tensor& fine,
                                                                   const at::Tensor& query, const at::Tensor& keys,
                                                                   const at::Tensor& cores);

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& gain, double epsilon);

}  // namespace ultramem
