// The kernels of a decode step; what they compute is said in ultramem/ops/decode.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace ultramem {

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

void add_tucker_memory(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& query_weight,
                       const at::Tensor& query_gain, double epsilon, const at::Tensor& keys,
                       const at::Tensor& contracted, const at::Tensor& cores, int64_t top_k, int64_t coarse_top_k,
                       bool is_signed, const at::Tensor& permutation, int64_t window_offset, int64_t window_size,
                       const at::Tensor& values, const std::optional<at::Tensor>& pre_values,
                       const std::optional<at::Tensor>& pre_weight, std::string_view activation, int64_t num_blocks,
                       const at::Tensor& out_weight);

}  // namespace ultramem
