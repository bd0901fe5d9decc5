// The gradients of rms_norm.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <tuple>

#include "kernels.h"
#include "product.h"

namespace ultramem {
namespace {

// Vectors of one partial sum of the gain's gradient: fixed, so that the sum does not depend on the threads.
constexpr int64_t kVectorsPerSum = 256;

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& gain, double epsilon) {
  const int64_t width = gain.size(0), num_vectors = width == 0 ? 0 : x.numel() / width;
  const int64_t num_sums = (num_vectors + kVectorsPerSum - 1) / kVectorsPerSum;
  const at::Tensor grad_x = at::empty(x.sizes(), x.options());
  const at::Tensor gain_sums = at::zeros({num_sums, width}, x.options());
  const float *grad_data = grad.const_data_ptr<float>(), *x_data = x.const_data_ptr<float>();
  const float* gains = gain.const_data_ptr<float>();
  float *grad_x_data = grad_x.mutable_data_ptr<float>(), *sums_data = gain_sums.mutable_data_ptr<float>();
  at::parallel_for(0, num_sums, 1, [&](int64_t begin, int64_t end) {
    const Scratch weighted(width);
    for (int64_t n = begin * kVectorsPerSum; n < std::min(end * kVectorsPerSum, num_vectors); ++n) {
      const float *from = x_data + n * width, *above = grad_data + n * width;
      float *out = grad_x_data + n * width, *sums = sums_data + n / kVectorsPerSum * width, *g = weighted.data();
      const float mean = inner_product(from, from, width) / static_cast<float>(width);
      const float scale = 1.0f / std::sqrt(mean + static_cast<float>(epsilon));
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) {
        g[i] = above[i] * gains[i];
        sums[i] += above[i] * (from[i] * scale);
      }
      const float along = inner_product(g, from, width) * scale * scale / static_cast<float>(width);
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) out[i] = scale * (g[i] - from[i] * along);
    }
  });
  return {grad_x, gain_sums.sum(0)};
}

}  // namespace ultramem
