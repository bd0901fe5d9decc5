// Everything that Python calls, in the one file that includes the headers for it, which take longer to compile than the
// kernels: all of them as torch.ops.ultramem_cpu.*, and the reads of few tokens past PyTorch's dispatcher, whose boxed
// call, with the checks in Python before it, takes longer than the rows of one token.
//
// Each of the latter takes what the operator of its name takes, and declines (None) wherever the operator has anything
// to see to, or to complain about: gradients, subclasses, dispatch modes, other devices and dtypes, shapes that do not
// fit.
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <array>

#include "decode.h"
#include "kernels.h"

namespace ultramem {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Plain memory of this device that nothing watches: no gradient, no transform of torch.func, no lazy negation.
bool is_plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
                                        c10::DispatchKey::ADInplaceOrView});
  return (tensor.key_set().raw_repr() & ~kPlain.raw_repr()) == 0 && tensor.is_cpu() &&
         !(tensor.requires_grad() && c10::GradMode::is_enabled());
}

// The arguments of one call. Whatever is not as it is asked for makes the call one to decline.
class Arguments {
 public:
  Arguments(PyObject* const* args, Py_ssize_t count, Py_ssize_t expected)
      : args_(args), fits_(count == expected && c10::impl::TorchDispatchModeTLS::stack_len() == 0) {}

  bool fit() const { return fits_; }
  bool fit(bool condition) { return fits_ = fits_ && condition; }

  const Tensor& tensor(int i) {
    static const Tensor none;
    if (!fit(fits_ && THPVariable_CheckExact(args_[i]))) return none;
    const Tensor& tensor = THPVariable_Unpack(args_[i]);
    fit(is_plain(tensor));
    return tensor;
  }

  OptionalTensor optional_tensor(int i) {
    return !fits_ || Py_IsNone(args_[i]) ? OptionalTensor() : OptionalTensor(tensor(i));
  }

  int64_t integer(int i) {
    const int64_t value = fits_ && PyLong_CheckExact(args_[i]) ? PyLong_AsLongLong(args_[i]) : -1;
    fit(value >= 0);
    return value;
  }

  // A string that lives as long as the argument; empty for None.
  std::string_view text(int i) {
    if (!fits_ || Py_IsNone(args_[i])) return {};
    Py_ssize_t size = 0;
    const char* data = PyUnicode_Check(args_[i]) ? PyUnicode_AsUTF8AndSize(args_[i], &size) : nullptr;
    fit(data != nullptr);
    return {data, static_cast<size_t>(size)};
  }

 private:
  PyObject* const* args_;
  bool fits_;
};

bool is_table(const Tensor& tensor) {
  return tensor.dim() == 2 && (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16);
}

bool is_operand(const Tensor& tensor) { return tensor.is_floating_point() && tensor.scalar_type() != at::kDouble; }

bool are_indices(const Tensor& idx, const OptionalTensor& block, int64_t num_blocks) {
  return idx.dim() == 2 && (idx.scalar_type() == at::kInt || idx.scalar_type() == at::kLong) &&
         (block ? num_blocks > 1 && block->sizes() == idx.sizes() : num_blocks == 1);
}

// Weights [N, K] as [N, K, 1]; others as they are.
Tensor with_cores(const Tensor& weights) { return weights.dim() == 2 ? weights.unsqueeze(-1) : weights; }

bool are_weights(const Tensor& weights, const Tensor& idx, int64_t width) {
  return is_operand(weights) && (weights.dim() == 2 || weights.dim() == 3) && weights.size(0) == idx.size(0) &&
         weights.size(1) == idx.size(1) &&
         (weights.dim() == 2 || (weights.size(2) > 0 && width % weights.size(2) == 0));
}

template <class Compute>
PyObject* computed(const Compute& compute) {
  Tensor out;
  {
    const pybind11::gil_scoped_release released;
    out = compute();
  }
  return THPVariable_Wrap(std::move(out));
}

PyObject* gather_dot_directly(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments arguments(args, count, 6);
  const Tensor &idx = arguments.tensor(0), &x = arguments.tensor(1), &table = arguments.tensor(2);
  const OptionalTensor block = arguments.optional_tensor(3);
  const int64_t num_blocks = arguments.integer(4), num_cores = arguments.integer(5);
  if (!(arguments.fit() && are_indices(idx, block, num_blocks) && is_table(table) && is_operand(x) && x.dim() == 2 &&
        x.size(0) == idx.size(0) && x.size(1) == num_blocks * table.size(1) && num_cores > 0 &&
        table.size(1) % num_cores == 0))
    Py_RETURN_NONE;
  RECORD_FUNCTION("ultramem::gather_dot", {});
  return computed([&] {
    const Tensor out = gather_dot(idx, x, table, block, num_blocks, num_cores);
    return num_cores == 1 ? out.squeeze(-1) : out;
  });
  END_HANDLE_TH_ERRORS
}

PyObject* bag_directly(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments arguments(args, count, 5);
  const Tensor &idx = arguments.tensor(0), &weights = arguments.tensor(1), &table = arguments.tensor(2);
  const OptionalTensor block = arguments.optional_tensor(3);
  const int64_t num_blocks = arguments.integer(4);
  if (!(arguments.fit() && are_indices(idx, block, num_blocks) && is_table(table) &&
        are_weights(weights, idx, table.size(1))))
    Py_RETURN_NONE;
  RECORD_FUNCTION("ultramem::bag", {});
  return computed([&] { return bag(idx, with_cores(weights), table, block, num_blocks); });
  END_HANDLE_TH_ERRORS
}

PyObject* pooled_read_directly(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments arguments(args, count, 8);
  const Tensor &idx = arguments.tensor(0), &scores = arguments.tensor(1), &values = arguments.tensor(2);
  const Tensor &x = arguments.tensor(3), &pre_values = arguments.tensor(4);
  const std::string_view activation = arguments.text(5);
  const OptionalTensor block = arguments.optional_tensor(6);
  const int64_t num_blocks = arguments.integer(7);
  if (!(arguments.fit() && are_indices(idx, block, num_blocks) && is_table(values) &&
        are_weights(scores, idx, values.size(1)) && is_operand(x) && x.dim() == 2 && x.size(0) == idx.size(0) &&
        pre_values.dim() == 2 && pre_values.scalar_type() == values.scalar_type() &&
        pre_values.size(0) == values.size(0) && pre_values.size(1) == x.size(1)))
    Py_RETURN_NONE;
  RECORD_FUNCTION("ultramem::pooled_read", {});
  return computed([&] {
    return pooled_read(idx, with_cores(scores), values, x, pre_values, activation, block, num_blocks);
  });
  END_HANDLE_TH_ERRORS
}

template <class Function>
PyMethodDef method(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace ultramem

PyMODINIT_FUNC PyInit_ultramem_cpu() {
  static PyMethodDef methods[] = {ultramem::method("gather_dot", ultramem::gather_dot_directly),
                                  ultramem::method("bag", ultramem::bag_directly),
                                  ultramem::method("pooled_read", ultramem::pooled_read_directly),
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "ultramem_cpu", nullptr, -1, methods};
  return PyModule_Create(&definition);
}

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
