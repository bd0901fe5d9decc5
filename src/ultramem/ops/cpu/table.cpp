// gather_dot, bag and scatter.
#include "common.h"

namespace ultramem {
namespace {

int64_t num_lanes() { return kLanes; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(ultramem_cpu, m) { m.def("num_lanes() -> int", &num_lanes); }

}  // namespace ultramem
