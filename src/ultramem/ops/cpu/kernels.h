// The kernels that bindings.cpp registers; what they compute is said where they are dispatched to, in ultramem/ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace ultramem {

at::Tensor gather_dot(const at::Tensor& idx, const at::Tensor& x, const at::Tensor& table,
                      const std::optional<at::Tensor>& block, int64_t num_blocks, int64_t num_cores);

at::Tensor bag(const at::Tensor& idx, const at::Tensor& w, const at::Tensor& table,
               const std::optional<at::Tensor>& block, int64_t num_blocks);

at::Tensor pooled_read(const at::Tensor& idx, const at::Tensor& scores, const at::Tensor& values, const at::Tensor& x,
                       const at::Tensor& pre_values, std::string_view activation_name,
                       const std::optional<at::Tensor>& block, int64_t num_blocks);

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

void set_ahead(int64_t ahead);

}  // namespace ultramem
