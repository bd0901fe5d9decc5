// The two-stage search of a product-key grid, from all fine scores or from queries and keys.
//
// Every score is computed by one thread in one order: the result does not depend on their number.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <tuple>

#include "grid_search.h"
#include "kernels.h"
#include "product.h"

namespace ultramem {
namespace {

using at::Tensor;

// Tokens whose coarse scores are made at a time: they stay in the L2 cache. Fixed, so that results do not depend on the
// number of threads.
constexpr int64_t kTokensPerBlock = 128;
// Up to so many tokens the threads share the keys instead.
constexpr int64_t kFewTokens = 64;

void check_size(int64_t coarse_top_k) {
  TORCH_CHECK_VALUE(coarse_top_k <= kMostCandidates, "the CPU search takes coarse_top_k up to ", kMostCandidates, ", got ",
                    coarse_top_k, "; ask for backend 'reference'.");
}

Tensor plain(const Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

const float* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// Coarse scores [2, N, H·S] of few tokens: the threads share the keys, of which one token alone needs all.
void score_keys(const Tensor& query, const Tensor& contracted, float* coarse) {
  const int64_t num_tokens = query.size(0), num_keys = contracted.size(1) * contracted.size(2);
  const int64_t width = contracted.size(3), num_blocks = (num_keys + kBlockRows - 1) / kBlockRows;
  const Tensor by_side = query.transpose(0, 1).contiguous();
  const float *queries = by_side.const_data_ptr<float>(), *keys = contracted.const_data_ptr<float>();
  const Activations sides[2] = {{queries, num_tokens, width}, {queries + num_tokens * width, num_tokens, width}};
  at::parallel_for(0, 2 * num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t side = task / num_blocks, key = task % num_blocks * kBlockRows;
      multiply_block(sides[side], keys + (side * num_keys + key) * width, std::min<int64_t>(kBlockRows, num_keys - key),
                     coarse + side * num_tokens * num_keys + key, num_keys, false);
    }
  });
}

}  // namespace

// `product_topk` from the fine scores of every key [N, H, S, r].
std::tuple<Tensor, Tensor> product_topk(const Tensor& rows, const Tensor& cols, const std::optional<Tensor>& cores,
                                        const std::optional<Tensor>& row_direction,
                                        const std::optional<Tensor>& col_direction, int64_t top_k, int64_t coarse_top_k,
                                        bool is_signed) {
  check_size(coarse_top_k);
  const int64_t num_tokens = rows.size(0), num_heads = rows.size(1), side = rows.size(2), rank = rows.size(3);
  const bool additive = !cores.has_value();
  const int64_t num_cores = additive ? 1 : cores->size(0);
  const Sizes sizes{static_cast<int>(side), static_cast<int>(rank), static_cast<int>(num_cores), static_cast<int>(top_k),
                    static_cast<int>(coarse_top_k), is_signed, additive};
  const Tensor sides[2] = {plain(rows), plain(cols)};
  std::optional<Tensor> all_cores, core_sum, directions[2];
  if (!additive) {
    all_cores = plain(*cores);
    core_sum = all_cores->sum(0).contiguous();
    directions[0] = plain(*row_direction);
    directions[1] = plain(*col_direction);
  }
  Tensor scores = at::empty({num_tokens, num_heads, top_k, num_cores}, rows.options().dtype(at::kFloat));
  Tensor slots = at::empty({num_tokens, num_heads, top_k}, rows.options().dtype(at::kLong));
  auto* slots_out = slots.mutable_data_ptr<int64_t>();
  auto* scores_out = scores.mutable_data_ptr<float>();
  at::parallel_for(0, num_tokens * num_heads, 4, [&](int64_t begin, int64_t end) {
    GridSearch search(sizes);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t head = n % num_heads;
      for (int s : {0, 1}) {
        const float* fine = sides[s].const_data_ptr<float>() + n * side * rank;
        search.choose(s, additive ? fine : search.contract(fine, data(directions[s]) + head * rank));
        for (int p = 0; p < rank; ++p) {
          float* out = search.fine_scores(s, additive ? s : p);
          for (int i = 0; i < coarse_top_k; ++i) out[i] = fine[search.candidates[s][i] * rank + p];
        }
      }
      search.search(additive ? nullptr : data(core_sum) + head * rank * rank);
      search.write(additive ? nullptr : data(all_cores) + head * rank * rank, num_heads * rank * rank,
                   slots_out + n * top_k, scores_out + n * top_k * num_cores, nullptr);
    }
  });
  return {scores, slots};
}

// The search from keys [H, 2, S, r, d]: queries [N, 2, Q, d] times contracted keys [2, H, S, Q·d] are the coarse scores,
// which choose; only the chosen keys meet the queries rank by rank. Also returns the fine scores of the selected keys
// [N, H, K, 2, r], which the gradients need.
std::tuple<Tensor, Tensor, Tensor> key_search(const Tensor& query, const Tensor& keys, const Tensor& contracted,
                                              const Tensor& cores, int64_t top_k, int64_t coarse_top_k, bool is_signed) {
  check_size(coarse_top_k);
  const int64_t num_tokens = query.size(0), num_queries = query.size(2), width = query.size(3);
  const int64_t num_heads = keys.size(0), side = keys.size(2), rank = keys.size(3), num_cores = cores.size(0);
  const Sizes sizes{static_cast<int>(side), static_cast<int>(rank), static_cast<int>(num_cores), static_cast<int>(top_k),
                    static_cast<int>(coarse_top_k), is_signed, false};
  const Tensor core_sum = cores.sum(0).contiguous();
  Tensor scores = at::empty({num_tokens, num_heads, top_k, num_cores}, query.options());
  Tensor slots = at::empty({num_tokens, num_heads, top_k}, query.options().dtype(at::kLong));
  Tensor fine = at::empty({num_tokens, num_heads, top_k, 2, rank}, query.options());
  const float *query_data = query.const_data_ptr<float>(), *key_data = keys.const_data_ptr<float>();
  const float *sum_data = core_sum.const_data_ptr<float>(), *core_data = cores.const_data_ptr<float>();
  auto *slots_out = slots.mutable_data_ptr<int64_t>();
  auto *scores_out = scores.mutable_data_ptr<float>(), *fine_out = fine.mutable_data_ptr<float>();
  // Tokens from `begin` on, by their coarse scores on both sides.
  const auto search_tokens = [&](GridSearch& search, int64_t begin, int64_t end, std::array<const float*, 2> coarse) {
    for (int64_t n = begin * num_heads; n < end * num_heads; ++n) {
      const int64_t token = n / num_heads, head = n % num_heads;
      for (int64_t s : {0, 1}) {
        search.choose(s, coarse[s] + (n - begin * num_heads) * side);
        for (int64_t p = 0; p < rank; ++p) {
          const float* x = query_data + ((token * 2 + s) * num_queries + (num_queries == 1 ? 0 : p)) * width;
          const float* matrix = key_data + ((head * 2 + s) * side * rank + p) * width;
          dot_rows(x, matrix, rank * width, width, search.candidates[s].data(), coarse_top_k, search.fine_scores(s, p));
        }
      }
      search.search(sum_data + head * rank * rank);
      search.write(core_data + head * rank * rank, num_heads * rank * rank, slots_out + n * top_k,
                   scores_out + n * top_k * num_cores, fine_out + n * top_k * 2 * rank);
    }
  };
  if (num_tokens <= kFewTokens) {
    const int64_t num_keys = num_heads * side;
    Scratch coarse(2 * num_tokens * num_keys);
    score_keys(query, contracted, coarse.data());
    at::parallel_for(0, num_tokens, 1, [&](int64_t begin, int64_t end) {
      GridSearch search(sizes);
      const float* first = coarse.data() + begin * num_keys;
      search_tokens(search, begin, end, {first, first + num_tokens * num_keys});
    });
    return {scores, slots, fine};
  }
  const Tensor queries = query.view({num_tokens, 2, num_queries * width});
  const Tensor transposed = contracted.flatten(1, 2).transpose(1, 2);
  at::parallel_for(0, (num_tokens + kTokensPerBlock - 1) / kTokensPerBlock, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowAutograd guard;
    GridSearch search(sizes);
    for (int64_t first = begin * kTokensPerBlock; first < std::min(end * kTokensPerBlock, num_tokens);
         first += kTokensPerBlock) {
      const int64_t count = std::min(kTokensPerBlock, num_tokens - first);
      Tensor coarse[2];
      for (int s : {0, 1}) coarse[s] = at::mm(queries.narrow(0, first, count).select(1, s), transposed.select(0, s));
      search_tokens(search, first, first + count, {coarse[0].const_data_ptr<float>(), coarse[1].const_data_ptr<float>()});
    }
  });
  return {scores, slots, fine};
}

}  // namespace ultramem
