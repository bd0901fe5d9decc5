// Huge pages for large tables.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace ultramem {
namespace {

constexpr uintptr_t kHugePageBytes = uintptr_t{2} << 20;

}  // namespace

// Ask the system to keep the whole huge pages inside a tensor's storage as such. Returns how many bytes were asked for.
int64_t advise_huge_pages(const at::Tensor& table) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto start = reinterpret_cast<uintptr_t>(table.const_data_ptr());
  const uintptr_t first = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (start + table.nbytes()) / kHugePageBytes * kHugePageBytes;
  if (first >= last) return 0;
  if (madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0)
    return static_cast<int64_t>(last - first);
#endif
  return 0;
}

}  // namespace ultramem
