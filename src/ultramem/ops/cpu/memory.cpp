// Huge pages for large tables.
#ifdef __linux__
#include <sys/mman.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#endif

#include <mutex>
#include <set>
#include <utility>

#include "kernels.h"

namespace ultramem {

// Random reads of a table in pages of 4 KB miss the TLB at every row. Here and not where tables are made, because
// loading, casting and moving make them anew: whatever storage a table has when it is read, it is looked after once.
int64_t keep_in_huge_pages(const at::Tensor& table) {
#ifdef __linux__
  constexpr uintptr_t kHugePageBytes = uintptr_t{2} << 20, kLargeTableBytes = uintptr_t{64} << 20;
  const uintptr_t num_bytes = table.nbytes();
  if (num_bytes < kLargeTableBytes) return 0;
  static std::mutex mutex;
  static std::set<std::pair<uintptr_t, uintptr_t>> seen;
  const auto start = reinterpret_cast<uintptr_t>(table.const_data_ptr());
  {
    const std::lock_guard<std::mutex> guard(mutex);
    if (!seen.emplace(start, num_bytes).second) return 0;
  }
  const uintptr_t first = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (start + num_bytes) / kHugePageBytes * kHugePageBytes;
  void* pages = reinterpret_cast<void*>(first);
  // The first is for pages to come, the second gathers those that exist, at once. Neither changes what is stored, and
  // systems without them refuse.
  const bool advised = madvise(pages, last - first, MADV_HUGEPAGE) == 0;
  const bool collapsed = madvise(pages, last - first, MADV_COLLAPSE) == 0;
  return advised || collapsed ? static_cast<int64_t>(last - first) : 0;
#else
  return 0;
#endif
}

}  // namespace ultramem
