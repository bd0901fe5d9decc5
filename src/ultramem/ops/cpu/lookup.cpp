// gather_dot, bag and pooled_read: reading the rows that tokens selected.
//
// All are bound by memory: a row is used once, for two operations per element. What decides is how many cache lines are
// under way at a time, hence the prefetches and the rows taken four at a time; arithmetic hides behind them.
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace ultramem {
namespace {

// A table whose rows are contiguous.
at::Tensor with_plain_rows(const at::Tensor& table) {
  if (table.stride(1) != 1) return table.contiguous();
  keep_in_huge_pages(table);
  return table;
}

// The dispatcher is asked only where there is something to do: for one token it takes as long as many rows.
at::Tensor as_type(const at::Tensor& operand, at::ScalarType type) {
  return operand.scalar_type() == type ? operand : operand.to(type);
}

at::Tensor as_floats(const at::Tensor& operand) { return as_type(operand, at::kFloat).contiguous(); }

// Call `body` with the lookup of the table's and the indices' types.
template <class Body>
void with_lookup(const Indices& indices, const at::Tensor& rows, int64_t num_blocks, int64_t num_cores,
                 const Body& body) {
  indices.visit([&](auto* idx, auto* block) {
    with_float_type(rows, [&](auto* data) {
      using Index = std::remove_cv_t<std::remove_pointer_t<decltype(idx)>>;
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
      body(Lookup<Index, T>{idx, block, data, indices.idx.size(1), rows.size(0), rows.size(1), rows.stride(0),
                            num_cores, num_blocks});
    });
  });
}

// Run `visit(token, entry, count)` over checked entries, with their rows prefetched.
template <class L, class Visit>
inline void for_prefetched_groups(const L& lookup, int64_t first, int64_t last, const Visit& visit) {
  const int64_t ahead = lookup.entries_ahead();
  for (int64_t entry = first; entry < std::min(first + ahead, last); ++entry) lookup.prefetch_row(entry);
  lookup.for_groups(first, last, [&](int64_t token, int64_t entry, int count) {
    for (int64_t next = entry + ahead; next < std::min(entry + ahead + count, last); ++next) lookup.prefetch_row(next);
    visit(token, entry, count);
  });
}

enum class Activation { kNone, kGelu, kRelu };

Activation activation_named(std::string_view name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK_VALUE(name.empty(), "unknown activation ", name);
  return Activation::kNone;
}

float activate(float value, Activation activation) {
  constexpr float kSqrtHalf = 0.70710678118654752f;
  if (activation == Activation::kGelu) return 0.5f * value * (1.0f + std::erf(value * kSqrtHalf));
  return activation == Activation::kRelu ? std::max(value, 0.0f) : value;
}

// The fused read of tokens in [lower, upper). A few tokens at a time are dotted with their pre-values, then pooled while
// their weights are in the first cache. (Rows of both tables taken in turns, slot by slot, were slower.)
template <class L>
void read_tokens(const L values, const L pre, int64_t lower, int64_t upper, const float* x, const float* scores,
                 Activation activation, float* out) {
  constexpr int64_t kEntriesAtOnce = 512;
  const int64_t slots = values.num_selected, cores = values.num_cores, out_width = values.num_blocks * values.width;
  const int64_t step = std::max<int64_t>(1, kEntriesAtOnce / std::max<int64_t>(1, slots));
  std::vector<float> dot_buffer(step * slots), weight_buffer(step * slots * cores);
  float *dots = dot_buffer.data(), *weights = weight_buffer.data();
  // Of one token these are all rows: the values come while the pre-values are dotted. (Asking for values at the end of
  // every pass over pre-values, and the other way round, cost a tenth of the speed at thousands of tokens.)
  const int64_t first = lower * slots, early = std::min(upper * slots, first + pre.entries_ahead());
  for (int64_t entry = first; entry < early; ++entry) pre.prefetch_row(entry);
  for (int64_t entry = first; entry < early; ++entry) values.prefetch_row(entry);
  for (int64_t token_start = lower; token_start < upper; token_start += step) {
    const int64_t start = token_start * slots, end = std::min(token_start + step, upper) * slots;
    for_prefetched_groups(pre, start, end, [=](int64_t token, int64_t entry, int count) {
      pre.dot(entry, count, x + token * pre.width, dots + (entry - start));
    });
    for (int64_t entry = start; entry < end; ++entry) {
      const float factor = activate(dots[entry - start], activation);
      for (int64_t core = 0; core < cores; ++core)
        weights[(entry - start) * cores + core] = scores[entry * cores + core] * factor;
    }
    for_prefetched_groups(values, start, end, [=](int64_t token, int64_t entry, int count) {
      values.pool(entry, count, weights + (entry - start) * cores, out + token * out_width);
    });
  }
}

}  // namespace

at::Tensor gather_dot(const at::Tensor& idx, const at::Tensor& x, const at::Tensor& table,
                      const std::optional<at::Tensor>& block, int64_t num_blocks, int64_t num_cores) {
  const Indices indices(idx, block);
  const at::Tensor rows = with_plain_rows(table), vectors = as_floats(x);
  const at::Tensor out = at::empty({idx.size(0), idx.size(1), num_cores}, vectors.options());
  const float* x_data = vectors.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  with_lookup(indices, rows, num_blocks, num_cores, [&](const auto& lookup) {
    const int64_t slots = lookup.num_selected, x_width = num_blocks * lookup.width;
    for_tokens(idx.size(0), slots * lookup.width, [&](int64_t lower, int64_t upper) {
      // Copies that live in registers; what a reference leads to is read again after each store.
      const auto own = lookup;
      const float* x_own = x_data;
      float* out_own = out_data;
      check_entries(own.idx, own.block, lower * slots, upper * slots, own.num_rows, own.num_blocks);
      for_prefetched_groups(own, lower * slots, upper * slots, [=](int64_t token, int64_t entry, int count) {
        own.dot(entry, count, x_own + token * x_width, out_own + entry * own.num_cores);
      });
    });
  });
  return as_type(out, x.scalar_type());
}

at::Tensor bag(const at::Tensor& idx, const at::Tensor& w, const at::Tensor& table,
               const std::optional<at::Tensor>& block, int64_t num_blocks) {
  const Indices indices(idx, block);
  const at::Tensor rows = with_plain_rows(table), weights = as_floats(w);
  const int64_t num_cores = w.size(2), out_width = num_blocks * table.size(1);
  const at::Tensor out = at::empty({idx.size(0), out_width}, weights.options());
  const float* w_data = weights.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  with_lookup(indices, rows, num_blocks, num_cores, [&](const auto& lookup) {
    const int64_t slots = lookup.num_selected;
    for_tokens(idx.size(0), slots * lookup.width, [&](int64_t lower, int64_t upper) {
      const auto own = lookup;
      const float* w_own = w_data;
      float* out_own = out_data;
      check_entries(own.idx, own.block, lower * slots, upper * slots, own.num_rows, own.num_blocks);
      std::fill(out_own + lower * out_width, out_own + upper * out_width, 0.0f);
      for_prefetched_groups(own, lower * slots, upper * slots, [=](int64_t token, int64_t entry, int count) {
        own.pool(entry, count, w_own + entry * own.num_cores, out_own + token * out_width);
      });
    });
  });
  return as_type(out, table.scalar_type());
}

at::Tensor pooled_read(const at::Tensor& idx, const at::Tensor& scores, const at::Tensor& values, const at::Tensor& x,
                       const at::Tensor& pre_values, std::string_view activation, const std::optional<at::Tensor>& block,
                       int64_t num_blocks) {
  const Activation kind = activation_named(activation);
  const Indices indices(idx, block);
  const at::Tensor rows = with_plain_rows(values), pre_rows = with_plain_rows(pre_values);
  const at::Tensor vectors = as_floats(x), weights = as_floats(scores);
  const int64_t num_cores = scores.size(2), out_width = num_blocks * values.size(1);
  const at::Tensor out = at::empty({idx.size(0), out_width}, weights.options());
  float* out_data = out.mutable_data_ptr<float>();
  with_lookup(indices, rows, num_blocks, num_cores, [&](const auto& lookup) {
    auto pre = lookup;
    pre.table = static_cast<decltype(pre.table)>(pre_rows.const_data_ptr());
    pre.block = nullptr;
    pre.width = pre_rows.size(1);
    pre.row_stride = pre_rows.stride(0);
    pre.num_cores = 1;
    const int64_t slots = lookup.num_selected;
    for_tokens(idx.size(0), slots * (lookup.width + pre.width), [&](int64_t lower, int64_t upper) {
      std::fill(out_data + lower * out_width, out_data + upper * out_width, 0.0f);
      check_entries(lookup.idx, lookup.block, lower * slots, upper * slots, lookup.num_rows, lookup.num_blocks);
      read_tokens(lookup, pre, lower, upper, vectors.const_data_ptr<float>(), weights.const_data_ptr<float>(), kind,
                  out_data);
    });
  });
  return as_type(out, values.scalar_type());
}

}  // namespace ultramem
