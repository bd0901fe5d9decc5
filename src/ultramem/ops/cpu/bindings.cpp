// Registers all kernels as torch.ops.ultramem_cpu.*. The one file that includes the registration's headers, which take
// longer to compile than the kernels.
#include <torch/library.h>

#include "decode.h"
#include "kernels.h"

TORCH_LIBRARY(ultramem_cpu, m) {
  m.def("gather_dot", &ultramem::gather_dot);
  m.def("bag", &ultramem::bag);
  m.def("pooled_read", &ultramem::pooled_read);
  m.def("product_topk", &ultramem::product_topk);
  m.def("key_search", &ultramem::key_search);
  m.def("key_search_backward", &ultramem::key_search_backward);
  m.def("scatter", &ultramem::scatter);
  m.def(
      "sum_rows(Tensor[] idx, Tensor[] w, Tensor[] x, Tensor?[] block, int[] num_blocks, int num_rows, int width) -> "
      "(Tensor, Tensor)",
      &ultramem::sum_rows);
  m.def("keep_in_huge_pages", &ultramem::keep_in_huge_pages);
  m.def("rms_norm", &ultramem::rms_norm);
  m.def("rms_norm_backward", &ultramem::rms_norm_backward);
  m.def("linear", &ultramem::linear);
  m.def("add_attention", &ultramem::add_attention);
  m.def("add_gated_ffn", &ultramem::add_gated_ffn);
  m.def("add_experts", &ultramem::add_experts);
  m.def("add_tucker_memory", &ultramem::add_tucker_memory);
}
