// One decode step: the sub-layers of a block for one new token of each sequence.
//
// Activations are fp32, weights and the KV cache whatever the model has; nothing is copied but cache lines. Tensors are
// contiguous and of one device; ultramem/model/decoding.py sees to that.
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>
#include <vector>

#include "decode.h"
#include "product.h"
#include "rows.h"

namespace ultramem {
namespace {

inline Floats exponential(Floats x) {
  // 2^n · e^r with |r| ≤ ln(2)/2. Adding 1.5 · 2²³ rounds to a whole n, which then stands in the lowest bits.
  x = x < -87.0f ? broadcast(-87.0f) : x;
  x = x > 88.0f ? broadcast(88.0f) : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  for (const float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    p = p * r + coefficient;
  p = p * r * r + r + 1.0f;
  return p * (Floats)(((Words)shifted << 23) + 0x3F800000u);
}

// gate ← silu(gate) · up
void gate_values(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats x = load(gate + i);
    store(gate + i, x / (exponential(-x) + 1.0f) * load(up + i));
  }
  for (; i < count; ++i) gate[i] = gate[i] / (std::exp(-gate[i]) + 1.0f) * up[i];
}

// Turn pairs (i, i + half) by the angles of a position.
void rotate(float* x, const float* cosines, const float* sines, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cosines[i] - second * sines[i];
    x[i + half] = second * cosines[i + half] + first * sines[i + half];
  }
}

// The keys and values of one sequence and head, [num_tokens, width].
template <class T>
struct History {
  const T *keys, *values;
  const bool* mask;  // null if all tokens are real
  int64_t num_tokens, width;
};

// How far ahead keys and values are asked for: the processor's own prefetching stops at every page.
constexpr int64_t kBytesAhead = 4096;

// Softmax-weighted values; `scores` has room for the tokens, rounded up to whole vectors.
template <class T>
void attend(const float* query, const History<T>& history, float* scores, float* out) {
  const int64_t num_tokens = history.num_tokens, width = history.width;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T)), ahead = kBytesAhead / static_cast<int64_t>(sizeof(T));
  if (width % kLanes == 0) {
    for (int64_t token = 0; token < num_tokens; token += kLanes) {
      Floats sums[kLanes] = {};
      const T* keys = history.keys + token * width;
      prefetch(keys + ahead, kLanes * row_bytes);
      const auto add_products = [&](int64_t j) {
        for (int64_t i = 0; i < width; i += kLanes) sums[j] += load(query + i) * load(keys + j * width + i);
      };
      if (token + kLanes <= num_tokens) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j) add_products(j);
      } else {
        for (int64_t j = 0; j < num_tokens - token; ++j) add_products(j);
      }
      store(scores + token, fold(sums));
    }
  } else {
    for (int64_t token = 0; token < num_tokens; ++token)
      scores[token] = inner_product(query, history.keys + token * width, width);
  }
  if (history.mask != nullptr)
    for (int64_t token = 0; token < num_tokens; ++token)
      if (!history.mask[token]) scores[token] = -std::numeric_limits<float>::infinity();
  // What fills up the last vector adds nothing.
  const int64_t whole = (num_tokens + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + num_tokens, scores + whole, -std::numeric_limits<float>::infinity());
  Floats highest = load(scores);
  for (int64_t token = kLanes; token < whole; token += kLanes) {
    const Floats some = load(scores + token);
    highest = some > highest ? some : highest;
  }
  float lanes[kLanes];
  store(lanes, highest);
  const float largest = *std::max_element(lanes, lanes + kLanes);
  Floats totals = {};
  for (int64_t token = 0; token < whole; token += kLanes) {
    const Floats score = load(scores + token), minus_infinity = broadcast(-std::numeric_limits<float>::infinity());
    // The exponential function is for finite numbers.
    const Floats weights = score == minus_infinity ? Floats{} : exponential(score - largest);
    store(scores + token, weights);
    totals += weights;
  }
  const float total = sum(totals);
  std::fill_n(out, width, 0.0f);
  int64_t token = 0;
  for (; token + 4 <= num_tokens; token += 4) {
    const T* row = history.values + token * width;
    const T* const rows[4] = {row, row + width, row + 2 * width, row + 3 * width};
    prefetch(row + ahead, 4 * row_bytes);
    add_rows<4>(out, rows, scores + token, 1, width);
  }
  for (; token < num_tokens; ++token) {
    const T* row = history.values + token * width;
    add_rows<1>(out, &row, scores + token, 1, width);
  }
  for (int64_t i = 0; i < width; ++i) out[i] /= total;
}

// Choices of experts, sorted by expert: `choice[starts[e] … starts[e + 1])` are positions in the flattened index.
struct ByExpert {
  ByExpert(const int64_t* index, int64_t num_choices, int64_t num_experts)
      : choice(num_choices), starts(num_experts + 1) {
    for (int64_t i = 0; i < num_choices; ++i) {
      TORCH_CHECK_INDEX(index[i] >= 0 && index[i] < num_experts, "expert ", index[i], " is none of ", num_experts, ".");
      ++starts[index[i] + 1];
    }
    for (int64_t expert = 0; expert < num_experts; ++expert) starts[expert + 1] += starts[expert];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < num_choices; ++i) choice[next[index[i]]++] = i;
  }

  std::vector<int64_t> choice, starts;
};

// Each expert's matrix [rows, width] times its rows of `x`, which are sorted by expert.
template <class T>
void multiply_experts(const float* x, const at::Tensor& weights, const ByExpert& sorted, float* out) {
  const int64_t num_experts = weights.size(0), num_rows = weights.size(1), width = weights.size(2);
  const int64_t num_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
  std::vector<int64_t> used;
  for (int64_t expert = 0; expert < num_experts; ++expert)
    if (sorted.starts[expert] < sorted.starts[expert + 1]) used.push_back(expert);
  const T* data = static_cast<const T*>(weights.const_data_ptr());
  at::parallel_for(0, static_cast<int64_t>(used.size()) * num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t expert = used[task / num_blocks], first = sorted.starts[expert];
      const Activations tokens(x + first * width, sorted.starts[expert + 1] - first, width);
      const int64_t last = std::min(end, (task / num_blocks + 1) * num_blocks);
      for (; task < last; ++task) {
        const int64_t row = task % num_blocks * kBlockRows;
        multiply_block(tokens, data + (expert * num_rows + row) * width,
                       std::min<int64_t>(kBlockRows, num_rows - row), out + first * num_rows + row, num_rows, false);
      }
    }
  });
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gain, double epsilon) {
  const int64_t width = gain.size(0), num_tokens = width == 0 ? 0 : x.numel() / width;
  const at::Tensor out = at::empty(x.sizes(), x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  with_float_type(gain, [&](auto* gains) {
    for_tokens(num_tokens, width, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token)
        normalize(from + token * width, gains, width, static_cast<float>(epsilon), to + token * width);
    });
  });
  return out;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  with_float_type(weight, [&](auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const Activations activations(x.const_data_ptr<float>(), x.size(0), x.size(1));
    multiply<T>(activations, {matrix_of<T>(weight, bias.value_or(at::Tensor()), out.mutable_data_ptr<float>(),
                                           weight.size(0), false)});
  });
  return out;
}

void add_attention(const at::Tensor& residual, const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                   at::TensorList gains, double epsilon, std::optional<double> clip, double scaling,
                   const at::Tensor& cosines, const at::Tensor& sines, const at::Tensor& keys,
                   const at::Tensor& values, int64_t position, const std::optional<at::Tensor>& mask) {
  const int64_t num_tokens = x.size(0), width = keys.size(3), num_kv_heads = keys.size(1), capacity = keys.size(2);
  const int64_t num_heads = weights[0].size(0) / width, group = num_heads / num_kv_heads;
  TORCH_CHECK_INDEX(position < capacity, "the KV cache holds ", capacity, " tokens and is full.");
  const int64_t query_width = num_heads * width, kv_width = num_kv_heads * width;
  const int64_t projected_width = query_width + 2 * kv_width;
  Scratch projected(num_tokens * projected_width), attended(num_tokens * query_width);
  const float *cos = cosines.const_data_ptr<float>(), *sin = sines.const_data_ptr<float>();
  const int64_t angle_stride = cosines.size(0) == 1 ? 0 : width;
  const bool* real = mask ? mask->const_data_ptr<bool>() : nullptr;
  with_float_type(keys, [&](auto* typed) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(typed)>>;
    const auto bias = [&](int i) { return biases.empty() ? at::Tensor() : biases[i]; };
    float* query = projected.data();
    const Activations inputs(x.const_data_ptr<float>(), num_tokens, x.size(1));
    multiply<T>(inputs, {matrix_of<T>(weights[0], bias(0), query, projected_width, false),
                         matrix_of<T>(weights[1], bias(1), query + query_width, projected_width, false),
                         matrix_of<T>(weights[2], bias(2), query + query_width + kv_width, projected_width, false)});
    T* key_cache = static_cast<T*>(keys.mutable_data_ptr());
    T* value_cache = static_cast<T*>(values.mutable_data_ptr());
    const T *query_gain = data_or_null<T>(gains[0]), *key_gain = data_or_null<T>(gains[1]);
    for_tokens(num_tokens, projected_width, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        float* q = query + token * projected_width;
        float *k = q + query_width, *v = k + kv_width;
        normalize(q, query_gain, query_width, static_cast<float>(epsilon), q);
        normalize(k, key_gain, kv_width, static_cast<float>(epsilon), k);
        if (clip) {
          const auto bound = static_cast<float>(*clip);
          for (int64_t i = 0; i < projected_width; ++i) q[i] = std::min(std::max(q[i], -bound), bound);
        }
        // Queries and keys lie side by side.
        for (int64_t head = 0; head < num_heads + num_kv_heads; ++head)
          rotate(q + head * width, cos + token * angle_stride, sin + token * angle_stride, width);
        for (int64_t i = 0; i < query_width; ++i) q[i] *= static_cast<float>(scaling);
        for (int64_t head = 0; head < num_kv_heads; ++head) {
          const int64_t place = ((token * num_kv_heads + head) * capacity + position) * width;
          for (int64_t i = 0; i < width; ++i) {
            key_cache[place + i] = static_cast<T>(k[head * width + i]);
            value_cache[place + i] = static_cast<T>(v[head * width + i]);
          }
        }
      }
    });
    for_tokens(num_tokens * num_kv_heads, (position + 1) * width * group, [&](int64_t begin, int64_t end) {
      std::vector<float> scores(position + 1 + kLanes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t token = task / num_kv_heads, first_head = task % num_kv_heads * group;
        const History<T> history{key_cache + task * capacity * width, value_cache + task * capacity * width,
                                 real == nullptr ? nullptr : real + token * (position + 1), position + 1, width};
        for (int64_t head = first_head; head < first_head + group; ++head)
          attend(query + token * projected_width + head * width, history, scores.data(),
                 attended.data() + token * query_width + head * width);
      }
    });
    const Activations outputs(attended.data(), num_tokens, query_width);
    multiply<T>(outputs, {matrix_of<T>(weights[3], bias(3), residual.mutable_data_ptr<float>(), residual.size(1),
                                       true)});
  });
}

void add_gated_ffn(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up,
                   const at::Tensor& down) {
  const int64_t num_tokens = x.size(0), inner = gate.size(0);
  Scratch gated(num_tokens * inner), other(num_tokens * inner);
  with_float_type(gate, [&](auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    const Activations inputs(x.const_data_ptr<float>(), num_tokens, x.size(1));
    multiply<T>(inputs, {matrix_of<T>(gate, {}, gated.data(), inner, false),
                         matrix_of<T>(up, {}, other.data(), inner, false)});
    for_tokens(num_tokens, 4 * inner, [&](int64_t begin, int64_t end) {
      gate_values(gated.data() + begin * inner, other.data() + begin * inner, (end - begin) * inner);
    });
    const Activations activations(gated.data(), num_tokens, inner);
    multiply<T>(activations, {matrix_of<T>(down, {}, residual.mutable_data_ptr<float>(), residual.size(1), true)});
  });
}

void add_experts(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down,
                 const at::Tensor& index, const at::Tensor& weights) {
  const int64_t num_tokens = x.size(0), width = x.size(1), inner = down.size(2), num_chosen = index.size(1);
  const int64_t num_choices = num_tokens * num_chosen;
  const ByExpert sorted(index.const_data_ptr<int64_t>(), num_choices, down.size(0));
  Scratch rows(num_choices * width), projected(num_choices * 2 * inner), gated(num_choices * inner);
  const float* tokens = x.const_data_ptr<float>();
  for_tokens(num_choices, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::copy_n(tokens + sorted.choice[i] / num_chosen * width, width, rows.data() + i * width);
  });
  with_float_type(down, [&](auto* data) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
    multiply_experts<T>(rows.data(), gate_up, sorted, projected.data());
    for_tokens(num_choices, 4 * inner, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* row = projected.data() + i * 2 * inner;
        std::copy_n(row, inner, gated.data() + i * inner);
        gate_values(gated.data() + i * inner, row + inner, inner);
      }
    });
    multiply_experts<T>(gated.data(), down, sorted, rows.data());
  });
  // Each token adds its experts' outputs in the order in which it chose them.
  std::vector<int64_t> place(num_choices);
  for (int64_t i = 0; i < num_choices; ++i) place[sorted.choice[i]] = i;
  const float* shares = weights.const_data_ptr<float>();
  float* out = residual.mutable_data_ptr<float>();
  for_tokens(num_tokens, num_chosen * width, [&](int64_t begin, int64_t end) {
    for (int64_t choice = begin * num_chosen; choice < end * num_chosen; ++choice) {
      const float* row = rows.data() + place[choice] * width;
      add_rows<1>(out + choice / num_chosen * width, &row, shares + choice, 1, width);
    }
  });
}

}  // namespace ultramem
