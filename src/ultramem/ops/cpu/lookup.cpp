// gather_dot and bag: reading the rows that tokens selected.
//
// Both are bound by memory: a row is used once, for two operations per element. What decides is how many cache lines
// are under way at a time, hence the prefetches; arithmetic hides behind them.
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace ultramem {
namespace {

int64_t g_ahead = 8;

template <class Body>
void with_lookup(const at::Tensor& idx, const at::Tensor& table, const std::optional<at::Tensor>& block,
                 int64_t num_blocks, int64_t num_cores, const Body& body) {
  const at::Tensor rows = table.stride(1) == 1 || table.size(1) == 1 ? table : table.contiguous();
  const at::Tensor indices = idx.contiguous();
  const at::Tensor blocks = block ? block->to(idx.scalar_type()).contiguous() : at::Tensor();
  with_index_type(indices, [&](auto* index) {
    using Index = std::remove_cv_t<std::remove_pointer_t<decltype(index)>>;
    with_float_type(rows, [&](auto* data) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
      body(Lookup<Index, T>{index, block ? static_cast<const Index*>(blocks.const_data_ptr()) : nullptr, data,
                            idx.size(1), table.size(0), table.size(1), rows.stride(0), num_cores, num_blocks});
    });
  });
}

}  // namespace

at::Tensor gather_dot(const at::Tensor& idx, const at::Tensor& x, const at::Tensor& table,
                      const std::optional<at::Tensor>& block, int64_t num_blocks, int64_t num_cores) {
  const int64_t num_tokens = idx.size(0), num_selected = idx.size(1);
  const at::Tensor vectors = x.to(at::kFloat).contiguous();
  const at::Tensor out = at::empty({num_tokens, num_selected, num_cores}, vectors.options());
  const float* x_data = vectors.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  with_lookup(idx, table, block, num_blocks, num_cores, [&](const auto& lookup) {
    const int64_t width = lookup.width, slice = lookup.slice(), row_bytes = lookup.row_bytes();
    for_tokens(num_tokens, num_selected * width, [&](int64_t lower, int64_t upper) {
      const int64_t last = upper * num_selected;
      check_entries(lookup, lower * num_selected, last);
      for (int64_t entry = lower * num_selected; entry < std::min(lower * num_selected + g_ahead, last); ++entry)
        prefetch(lookup.row(entry), row_bytes);
      for (int64_t token = lower; token < upper; ++token) {
        for (int64_t entry = token * num_selected; entry < (token + 1) * num_selected; ++entry) {
          if (entry + g_ahead < last) prefetch(lookup.row(entry + g_ahead), row_bytes);
          const float* x_block = x_data + token * num_blocks * width + lookup.block_start(entry);
          const auto* row = lookup.row(entry);
          for (int64_t core = 0; core < num_cores; ++core)
            out_data[entry * num_cores + core] = dot(x_block + core * slice, row + core * slice, slice);
        }
      }
    });
  });
  return out.to(x.scalar_type());
}

at::Tensor bag(const at::Tensor& idx, const at::Tensor& w, const at::Tensor& table,
               const std::optional<at::Tensor>& block, int64_t num_blocks) {
  const int64_t num_tokens = idx.size(0), num_selected = idx.size(1), num_cores = w.size(2);
  const at::Tensor weights = w.to(at::kFloat).contiguous();
  const int64_t out_width = num_blocks * table.size(1);
  const at::Tensor out = at::empty({num_tokens, out_width}, weights.options());
  const float* w_data = weights.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  with_lookup(idx, table, block, num_blocks, num_cores, [&](const auto& lookup) {
    const int64_t row_bytes = lookup.row_bytes();
    for_tokens(num_tokens, num_selected * lookup.width, [&](int64_t lower, int64_t upper) {
      const int64_t last = upper * num_selected;
      check_entries(lookup, lower * num_selected, last);
      for (int64_t entry = lower * num_selected; entry < std::min(lower * num_selected + g_ahead, last); ++entry)
        prefetch(lookup.row(entry), row_bytes);
      for (int64_t token = lower; token < upper; ++token) {
        float* out_row = out_data + token * out_width;
        std::fill_n(out_row, out_width, 0.0f);
        const int64_t end = (token + 1) * num_selected;
        for (int64_t entry = token * num_selected; entry < end; entry += 4) {
          const int count = static_cast<int>(std::min<int64_t>(4, end - entry));
          for (int j = 0; j < count; ++j)
            if (entry + j + g_ahead < last) prefetch(lookup.row(entry + j + g_ahead), row_bytes);
          pool_entries(lookup, entry, count, w_data + entry * num_cores, out_row);
        }
      }
    });
  });
  return out.to(table.scalar_type());
}

namespace {

enum class Activation { kNone, kGelu, kRelu };

inline float activate(float value, Activation activation) {
  if (activation == Activation::kGelu) return 0.5f * value * (1.0f + std::erf(value * 0.70710678118654752f));
  return activation == Activation::kRelu ? std::max(value, 0.0f) : value;
}

}  // namespace

at::Tensor pooled_read(const at::Tensor& idx, const at::Tensor& scores, const at::Tensor& values, const at::Tensor& x,
                       const at::Tensor& pre_values, std::string_view activation_name,
                       const std::optional<at::Tensor>& block, int64_t num_blocks) {
  const Activation activation = activation_name == "gelu"   ? Activation::kGelu
                                : activation_name == "relu" ? Activation::kRelu
                                                            : Activation::kNone;
  const int64_t num_tokens = idx.size(0), num_selected = idx.size(1), num_cores = scores.size(2);
  const at::Tensor vectors = x.to(at::kFloat).contiguous(), weights = scores.to(at::kFloat).contiguous();
  const int64_t out_width = num_blocks * values.size(1);
  const at::Tensor out = at::empty({num_tokens, out_width}, weights.options());
  const float* x_data = vectors.const_data_ptr<float>();
  const float* w_data = weights.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  const at::Tensor pre_rows = pre_values.to(values.scalar_type()).contiguous();
  with_lookup(idx, values, block, num_blocks, num_cores, [&](const auto& lookup) {
    auto pre = lookup;
    pre.width = pre_rows.size(1);
    pre.row_stride = pre_rows.stride(0);
    pre.table = static_cast<decltype(pre.table)>(pre_rows.const_data_ptr());
    constexpr int64_t kSlots = 32;
    const int64_t ahead_pre = g_ahead;
    for_tokens(num_tokens, num_selected * (lookup.width + pre.width), [&](int64_t lower, int64_t upper) {
      const int64_t last = upper * num_selected;
      check_entries(lookup, lower * num_selected, last);
      std::vector<float> slot_weights(kSlots * num_cores);
      for (int64_t entry = lower * num_selected; entry < std::min(lower * num_selected + ahead_pre, last); ++entry)
        prefetch(pre.row(entry), pre.row_bytes());
      for (int64_t token = lower; token < upper; ++token) {
        float* out_row = out_data + token * out_width;
        std::fill_n(out_row, out_width, 0.0f);
        const int64_t end = (token + 1) * num_selected;
        for (int64_t first = token * num_selected; first < end; first += kSlots) {
          const int64_t count = std::min(kSlots, end - first);
          for (int64_t j = 0; j < count; ++j) {
            prefetch(lookup.row(first + j), lookup.row_bytes());
            if (j + ahead_pre < count) prefetch(pre.row(first + j + ahead_pre), pre.row_bytes());
            const float factor = activate(dot(x_data + token * pre.width, pre.row(first + j), pre.width), activation);
            for (int64_t core = 0; core < num_cores; ++core)
              slot_weights[j * num_cores + core] = w_data[(first + j) * num_cores + core] * factor;
          }
          for (int64_t j = 0; j < count; j += 4) {
            const int group = static_cast<int>(std::min<int64_t>(4, count - j));
            // the first pre-values of the next slots
            for (int i = 0; i < group; ++i)
              if (j + i < ahead_pre && first + count + j + i < last)
                prefetch(pre.row(first + count + j + i), pre.row_bytes());
            pool_entries(lookup, first + j, group, slot_weights.data() + j * num_cores, out_row);
          }
        }
      }
    });
  });
  return out.to(values.scalar_type());
}

void set_ahead(int64_t ahead) { g_ahead = ahead; }

}  // namespace ultramem
