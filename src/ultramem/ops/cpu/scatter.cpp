// scatter and sum_rows: the gradient of a table, dense or as rows.
//
// Entries are sorted by row, and whole rows are dealt out to the threads: each row is summed by one thread, in the order
// of its entries, so that the bits do not depend on how many threads there are.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace ultramem {
namespace {

// The factors of one lookup's gradient: row idx[n, k] receives w[n, k, c] · x[n, block[n, k], c-th slice].
struct Factors {
  at::Tensor w, x;
  Indices indices;
  int64_t num_cores, num_blocks, num_selected, width, first_entry;

  Factors(const at::Tensor& idx, const at::Tensor& weights, const at::Tensor& vectors,
          const std::optional<at::Tensor>& block, int64_t blocks, int64_t first)
      : w(weights.to(at::kFloat).contiguous()),
        x(vectors.to(at::kFloat).contiguous()),
        indices(idx, block),
        num_cores(weights.size(2)),
        num_blocks(blocks),
        num_selected(idx.size(1)),
        width(vectors.size(1) / blocks),
        first_entry(first) {}

  int64_t num_entries() const { return indices.idx.numel(); }
};

// One entry to be summed: where its weights and its vector are.
struct Source {
  const float* w;
  const float* x;
  int64_t num_cores;
};

// Row in the upper half, number of the entry in the lower: sorting by row keeps the order of entries.
typedef uint64_t Key;
inline int64_t row_of(Key key) { return static_cast<int64_t>(key >> 32); }
inline int64_t entry_of(Key key) { return static_cast<int64_t>(key & 0xffffffffu); }

// Stable radix sort by row, 11 bits at a time.
void sort_by_row(std::vector<Key>& keys, int64_t num_rows) {
  constexpr int kDigitBits = 11;
  constexpr size_t kDigits = size_t{1} << kDigitBits;
  std::vector<Key> other(keys.size());
  for (int shift = 0; (num_rows - 1) >> shift > 0; shift += kDigitBits) {
    std::vector<size_t> starts(kDigits + 1, 0);
    for (const Key key : keys) ++starts[((key >> 32 >> shift) & (kDigits - 1)) + 1];
    for (size_t digit = 1; digit <= kDigits; ++digit) starts[digit] += starts[digit - 1];
    for (const Key key : keys) other[starts[(key >> 32 >> shift) & (kDigits - 1)]++] = key;
    keys.swap(other);
  }
}

std::vector<Key> sorted_keys(const std::vector<Factors>& parts, int64_t num_rows) {
  int64_t num_entries = 0;
  for (const Factors& part : parts) num_entries += part.num_entries();
  TORCH_CHECK(num_entries < (int64_t{1} << 32) && num_rows < (int64_t{1} << 32), "too many entries or rows to sort");
  std::vector<Key> keys(num_entries);
  for (const Factors& part : parts) {
    part.indices.visit([&](auto* idx, auto* block) {
      check_entries(idx, block, 0, part.num_entries(), num_rows, part.num_blocks);
      for (int64_t entry = 0; entry < part.num_entries(); ++entry)
        keys[part.first_entry + entry] =
            static_cast<Key>(idx[entry]) << 32 | static_cast<Key>(part.first_entry + entry);
    });
  }
  sort_by_row(keys, num_rows);
  return keys;
}

Source source_of(const std::vector<Factors>& parts, int64_t entry) {
  const Factors* part = &parts[0];
  if (parts.size() > 1) {
    const auto after = std::upper_bound(parts.begin(), parts.end(), entry,
                                        [](int64_t value, const Factors& each) { return value < each.first_entry; });
    part = &*std::prev(after);
  }
  const int64_t local = entry - part->first_entry;
  int64_t block_index = 0;
  if (part->indices.block.defined())
    part->indices.visit([&](auto*, auto* block) { block_index = static_cast<int64_t>(block[local]); });
  const int64_t token = local / part->num_selected;
  return {part->w.const_data_ptr<float>() + local * part->num_cores,
          part->x.const_data_ptr<float>() + (token * part->num_blocks + block_index) * part->width, part->num_cores};
}

// Sum the entries keys[first, last) of one row into `out`.
void sum_entries(const std::vector<Factors>& parts, const Key* keys, int64_t first, int64_t last, float* out,
                 int64_t width) {
  std::fill_n(out, width, 0.0f);
  for (int64_t i = first; i < last; ++i) {
    const Source source = source_of(parts, entry_of(keys[i]));
    const int64_t slice = width / source.num_cores;
    for (int64_t core = 0; core < source.num_cores; ++core) {
      const float* part = source.x + core * slice;
      add_rows<1>(out + core * slice, &part, source.w + core, source.num_cores, slice);
    }
  }
}

// Positions in the sorted keys at which a new row starts, and the end.
std::vector<int64_t> row_starts(const std::vector<Key>& keys) {
  std::vector<int64_t> starts;
  for (size_t i = 0; i < keys.size(); ++i)
    if (i == 0 || row_of(keys[i]) != row_of(keys[i - 1])) starts.push_back(static_cast<int64_t>(i));
  starts.push_back(static_cast<int64_t>(keys.size()));
  return starts;
}

// Call `write(group)` for each distinct row; threads get about equal numbers of entries.
template <class Write>
void for_rows(const std::vector<int64_t>& starts, int64_t width, const Write& write) {
  const int64_t num_entries = starts.back();
  for_tokens(num_entries, width, [&](int64_t lower, int64_t upper) {
    const auto first = std::lower_bound(starts.begin(), starts.end(), lower) - starts.begin();
    const auto last = std::lower_bound(starts.begin(), starts.end(), upper) - starts.begin();
    for (auto group = first; group < last; ++group) write(group);
  });
}

#ifdef __linux__
// Memory for the gradients of large tables, of which every backward makes a new one. Mapping it anew costs more than
// filling it, by far where the system first has to gather huge pages; so the last ones that were freed are kept for the
// next. Until then the system may take their pages back, if memory runs short.
class GradientMemory {
 public:
  static GradientMemory& shared() {
    // Never destroyed: tensors may outlive everything else.
    static auto* memory = new GradientMemory;
    return *memory;
  }

  // Zeros, in whole huge pages.
  float* take(size_t num_bytes) {
    void* found = nullptr;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      const auto fitting =
          std::find_if(kept_.begin(), kept_.end(), [=](const auto& entry) { return entry.second == num_bytes; });
      if (fitting != kept_.end()) {
        found = fitting->first;
        kept_.erase(fitting);
      }
    }
    if (found == nullptr) return static_cast<float*>(map(num_bytes));
    char* data = static_cast<char*>(found);
    at::parallel_for(0, static_cast<int64_t>(num_bytes / kHugePageBytes), 1, [=](int64_t lower, int64_t upper) {
      std::memset(data + lower * kHugePageBytes, 0, (upper - lower) * kHugePageBytes);
    });
    return static_cast<float*>(found);
  }

  void give_back(void* data, size_t num_bytes) {
    madvise(data, num_bytes, MADV_FREE);
    std::pair<void*, size_t> oldest{nullptr, 0};
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      kept_.emplace_back(data, num_bytes);
      if (kept_.size() > kMostKept) {
        oldest = kept_.front();
        kept_.pop_front();
      }
    }
    if (oldest.first != nullptr) munmap(oldest.first, oldest.second);
  }

  static constexpr size_t kHugePageBytes = size_t{2} << 20;

 private:
  // Values and pre-values, and what is added to each.
  static constexpr size_t kMostKept = 4;

  static void* map(size_t num_bytes) {
    // One huge page more, of which the ends are given back, brings the start to a whole one.
    const size_t with_room = num_bytes + kHugePageBytes;
    void* mapped = mmap(nullptr, with_room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(mapped != MAP_FAILED, "DefaultCPUAllocator: can't allocate memory: a gradient of ", num_bytes, " bytes");
    char* lowest = static_cast<char*>(mapped);
    const size_t before = (kHugePageBytes - reinterpret_cast<uintptr_t>(mapped) % kHugePageBytes) % kHugePageBytes;
    char* data = lowest + before;
    if (before > 0) munmap(lowest, before);
    munmap(data + num_bytes, kHugePageBytes - before);
    madvise(data, num_bytes, MADV_HUGEPAGE);
    return data;
  }

  std::mutex mutex_;
  std::deque<std::pair<void*, size_t>> kept_;
};
#endif

at::Tensor zero_rows(int64_t num_rows, int64_t width) {
#ifdef __linux__
  constexpr size_t kPage = GradientMemory::kHugePageBytes;
  const size_t num_bytes = static_cast<size_t>(num_rows) * static_cast<size_t>(width) * sizeof(float);
  if (num_bytes >= 4 * kPage) {
    const size_t whole_bytes = (num_bytes + kPage - 1) / kPage * kPage;
    float* data = GradientMemory::shared().take(whole_bytes);
    return at::from_blob(
        data, {num_rows, width}, [whole_bytes](void* freed) { GradientMemory::shared().give_back(freed, whole_bytes); },
        at::TensorOptions().dtype(at::kFloat));
  }
#endif
  return at::zeros({num_rows, width}, at::TensorOptions().dtype(at::kFloat));
}

}  // namespace

at::Tensor scatter(const at::Tensor& idx, const at::Tensor& w, const at::Tensor& x, int64_t num_rows,
                   const std::optional<at::Tensor>& block, int64_t num_blocks) {
  std::vector<Factors> parts;
  parts.emplace_back(idx, w, x, block, num_blocks, 0);
  const int64_t width = parts[0].width;
  const std::vector<Key> keys = sorted_keys(parts, num_rows);
  const at::Tensor out = zero_rows(num_rows, width);
  float* data = out.mutable_data_ptr<float>();
  const std::vector<int64_t> starts = row_starts(keys);
  for_rows(starts, width, [&](int64_t group) {
    sum_entries(parts, keys.data(), starts[group], starts[group + 1], data + row_of(keys[starts[group]]) * width, width);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> sum_rows(const std::vector<at::Tensor>& idx, const std::vector<at::Tensor>& w,
                                            const std::vector<at::Tensor>& x,
                                            const c10::List<std::optional<at::Tensor>>& block,
                                            const std::vector<int64_t>& num_blocks, int64_t num_rows, int64_t width) {
  std::vector<Factors> parts;
  int64_t num_entries = 0;
  for (size_t i = 0; i < idx.size(); ++i) {
    if (idx[i].numel() == 0) continue;
    parts.emplace_back(idx[i], w[i], x[i], block.get(i), num_blocks[i], num_entries);
    num_entries += idx[i].numel();
  }
  const std::vector<Key> keys = sorted_keys(parts, num_rows);
  const std::vector<int64_t> starts = row_starts(keys);
  const int64_t num_distinct = static_cast<int64_t>(starts.size()) - 1;
  const at::Tensor rows = at::empty({num_distinct}, at::TensorOptions().dtype(at::kLong));
  const at::Tensor out = at::empty({num_distinct, width}, at::TensorOptions().dtype(at::kFloat));
  int64_t* row_data = rows.mutable_data_ptr<int64_t>();
  float* data = out.mutable_data_ptr<float>();
  for_rows(starts, width, [&](int64_t group) {
    row_data[group] = row_of(keys[starts[group]]);
    sum_entries(parts, keys.data(), starts[group], starts[group + 1], data + group * width, width);
  });
  return {rows, out};
}

}  // namespace ultramem
