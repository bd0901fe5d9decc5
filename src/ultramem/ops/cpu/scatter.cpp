// scatter and sum_rows: the gradient of a table, dense or as rows.
//
// Entries are sorted by row, and whole rows are dealt out to the threads: each row is summed by one thread, in the order
// of its entries, so that the bits do not depend on how many threads there are.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
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
  const float *w_data, *x_data;

  Factors(const at::Tensor& idx, const at::Tensor& weights, const at::Tensor& vectors,
          const std::optional<at::Tensor>& block, int64_t blocks, int64_t first)
      : w(weights.to(at::kFloat).contiguous()),
        x(vectors.to(at::kFloat).contiguous()),
        indices(idx, block),
        num_cores(weights.size(2)),
        num_blocks(blocks),
        num_selected(idx.size(1)),
        width(vectors.size(1) / blocks),
        first_entry(first),
        w_data(w.const_data_ptr<float>()),
        x_data(x.const_data_ptr<float>()) {}

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
  return {part->w_data + local * part->num_cores,
          part->x_data + (token * part->num_blocks + block_index) * part->width, part->num_cores};
}

// Sum the entries keys[first, last) of one row into `out`.
void sum_entries(const std::vector<Factors>& parts, const std::vector<Key>& keys, int64_t first, int64_t last,
                 float* out, int64_t width) {
  constexpr size_t kEntriesAhead = 4;
  std::fill_n(out, width, 0.0f);
  for (int64_t i = first; i < last; ++i) {
    if (i + kEntriesAhead < keys.size()) {
      const Source next = source_of(parts, entry_of(keys[i + kEntriesAhead]));
      __builtin_prefetch(next.w);
      prefetch(next.x, width * static_cast<int64_t>(sizeof(float)));
    }
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
  // Without branches: whether a row is new is hard to foretell.
  std::vector<int64_t> starts(keys.size() + 1);
  int64_t count = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    starts[count] = static_cast<int64_t>(i);
    count += i == 0 || row_of(keys[i]) != row_of(keys[i - 1]);
  }
  starts[count] = static_cast<int64_t>(keys.size());
  starts.resize(count + 1);
  return starts;
}

// Call `write(first, last)` on groups of entries of one row each; threads get about equal numbers of entries.
template <class Write>
void for_rows(const std::vector<int64_t>& starts, int64_t width, const Write& write) {
  const int64_t num_entries = starts.back();
  for_tokens(num_entries, width, [&](int64_t lower, int64_t upper) {
    const auto first = std::lower_bound(starts.begin(), starts.end(), lower) - starts.begin();
    const auto last = std::lower_bound(starts.begin(), starts.end(), upper) - starts.begin();
    write(first, last);
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

  // Whatever was in it, in whole huge pages.
  float* take(size_t num_bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      const auto fitting =
          std::find_if(kept_.begin(), kept_.end(), [=](const auto& entry) { return entry.second == num_bytes; });
      if (fitting != kept_.end()) {
        void* found = fitting->first;
        kept_.erase(fitting);
        return static_cast<float*>(found);
      }
    }
    return static_cast<float*>(map(num_bytes));
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

// Rows [num_rows, width] to be written, in memory for `most_rows` of them, and how they are written: gradients of large
// tables past the caches.
struct Output {
  Output(int64_t num_rows, int64_t width, int64_t most_rows) : width(width) {
#ifdef __linux__
    constexpr size_t kPage = GradientMemory::kHugePageBytes;
    const size_t num_bytes = static_cast<size_t>(most_rows) * static_cast<size_t>(width) * sizeof(float);
    if (num_bytes >= 4 * kPage) {
      const size_t whole_bytes = (num_bytes + kPage - 1) / kPage * kPage;
      data = GradientMemory::shared().take(whole_bytes);
      rows = at::from_blob(
          data, {num_rows, width},
          [whole_bytes](void* freed) { GradientMemory::shared().give_back(freed, whole_bytes); },
          at::TensorOptions().dtype(at::kFloat));
      streamed = true;
      return;
    }
#endif
    rows = at::empty({num_rows, width}, at::TensorOptions().dtype(at::kFloat));
    data = rows.mutable_data_ptr<float>();
  }

  void zero(int64_t first_row, int64_t last_row) const {
    float *to = data + first_row * width, *end = data + last_row * width;
    if (!streamed) {
      std::fill(to, end, 0.0f);
      return;
    }
    for (; to < end && !starts_vector(to); ++to) *to = 0.0f;
    for (; to + kLanes <= end; to += kLanes) stream(to, Floats{});
    std::fill(to, end, 0.0f);
  }

  void write(int64_t row, const float* from) const {
    float *to = data + row * width, *end = to + width;
    if (streamed && starts_vector(to))
      for (; to + kLanes <= end; to += kLanes, from += kLanes) stream(to, load(from));
    std::copy_n(from, end - to, to);
  }

  static bool starts_vector(const float* to) { return reinterpret_cast<uintptr_t>(to) % sizeof(Floats) == 0; }

  at::Tensor rows;
  float* data;
  int64_t width;
  bool streamed = false;
};

// A table's rows with their entries, dealt out to threads by what they cost: a write for each row, and a sum for each
// entry, which takes about as long as two.
class Shares {
 public:
  Shares(const std::vector<Key>& keys, const std::vector<int64_t>& starts, int64_t num_rows)
      : keys_(keys), starts_(starts), num_rows_(num_rows) {}

  struct Bound {
    int64_t row, group;
  };

  int64_t total() const { return num_rows_ + kRowsPerEntry * starts_.back(); }

  // The first row, and the first group of entries at or behind it, that come after so much work.
  Bound bound(int64_t work) const {
    int64_t low = 0, high = static_cast<int64_t>(starts_.size()) - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (row(middle) + kRowsPerEntry * starts_[middle] < work) low = middle + 1;
      else high = middle;
    }
    const int64_t after = low == 0 ? 0 : row(low - 1) + 1;
    return {std::max(after, work - kRowsPerEntry * starts_[low]), low};
  }

  int64_t row(int64_t group) const { return row_of(keys_[starts_[group]]); }

 private:
  static constexpr int64_t kRowsPerEntry = 2;
  const std::vector<Key>& keys_;
  const std::vector<int64_t>& starts_;
  int64_t num_rows_;
};

}  // namespace

at::Tensor scatter(const at::Tensor& idx, const at::Tensor& w, const at::Tensor& x, int64_t num_rows,
                   const std::optional<at::Tensor>& block, int64_t num_blocks) {
  std::vector<Factors> parts;
  parts.emplace_back(idx, w, x, block, num_blocks, 0);
  const int64_t width = parts[0].width;
  const std::vector<Key> keys = sorted_keys(parts, num_rows);
  const std::vector<int64_t> starts = row_starts(keys);
  const Output out(num_rows, width, num_rows);
  const Shares shares(keys, starts, num_rows);
  // Each row is written once: the sum of its entries, or zeros.
  for_tokens(shares.total(), width, [&](int64_t lower, int64_t upper) {
    const auto first = shares.bound(lower), last = shares.bound(upper);
    std::vector<float> sum(width);
    int64_t row = first.row;
    for (int64_t group = first.group; group < last.group; ++group) {
      out.zero(row, shares.row(group));
      row = shares.row(group);
      sum_entries(parts, keys, starts[group], starts[group + 1], sum.data(), width);
      out.write(row++, sum.data());
    }
    out.zero(row, last.row);
    finish_streams();
  });
  return out.rows;
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
  // As many bytes in every step, whatever is distinct: what the step before has freed fits.
  const Output out(num_distinct, width, static_cast<int64_t>(keys.size()));
  int64_t* row_data = rows.mutable_data_ptr<int64_t>();
  for_rows(starts, width, [&](int64_t first, int64_t last) {
    std::vector<float> sum(width);
    for (int64_t group = first; group < last; ++group) {
      row_data[group] = row_of(keys[starts[group]]);
      sum_entries(parts, keys, starts[group], starts[group + 1], sum.data(), width);
      out.write(group, sum.data());
    }
    finish_streams();
  });
  return {rows, out.rows};
}

}  // namespace ultramem
