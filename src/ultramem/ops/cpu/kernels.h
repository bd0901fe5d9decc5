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

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gain, double epsilon);

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

void add_attention(const at::Tensor& residual, const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                   at::TensorList gains, double epsilon, std::optional<double> clip, double scaling,
                   const at::Tensor& cosines, const at::Tensor& sines, const at::Tensor& keys,
                   const at::Tensor& values, int64_t position, const std::optional<at::Tensor>& mask);

void add_gated_ffn(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up,
                   const at::Tensor& down);

void add_experts(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
                 const at::Tensor& index, const at::Tensor& weights);

int64_t advise_huge_pages(const at::Tensor& table);

}  // namespace ultramem
