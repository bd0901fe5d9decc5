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

int64_t advise_huge_pages(const at::Tensor& table);

void set_ahead(int64_t ahead);

}  // namespace ultramem
