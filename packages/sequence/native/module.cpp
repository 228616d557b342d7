// The native part of pareto_sequence as a Python module. Arrays come through DLPack; no tensor library is linked
// against.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "conv.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace pareto {
namespace {

template <typename T, size_t dimensions>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
using Input = Array<const float, 3>;
using Weight = Array<const float, 2>;
using Vector = Array<const float, 1>;

constexpr int kMostThreads = 1024;

const Kernels& kernels_of(const std::string& isa) {
  const Kernels* kernels = find_kernels(isa.c_str());
  if (!kernels) throw nb::value_error("isa must be one of available(), or empty for the best of them");
  return *kernels;
}

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

Geometry geometry_of(const Input& x, int64_t taps, int64_t dilation, bool circular, bool mirrored) {
  constexpr int64_t kMostSpan = (int64_t{1} << 31) - 1;
  require(x.shape(2) >= 1, "the sequence must have at least one position");
  require(taps >= 1 && taps <= kMostSpan, "the weight must have 1 to 2^31 - 1 taps");
  require(dilation >= 1 && dilation <= kMostSpan, "dilation must be 1 to 2^31 - 1");
  require(taps == 1 || (taps - 1) <= kMostSpan / dilation, "(taps - 1) * dilation must be below 2^31");
  const Padding padding = circular ? Padding::circular : Padding::causal;
  return Geometry(static_cast<int64_t>(x.shape(2)), taps, dilation, padding, mirrored);
}

bool overlap(const float* a, size_t a_count, const float* b, size_t b_count) {
  return a < b + b_count && b < a + a_count;
}

void convolve_arrays(const Input& x, const Weight& weight, const std::optional<Vector>& bias,
                     const Array<float, 3>& out, int64_t dilation, bool circular, bool mirrored, int threads,
                     const std::string& isa) {
  require(weight.shape(0) == x.shape(1), "weight must have a row for every channel of x");
  require(!bias || bias->shape(0) == x.shape(1), "bias must have a value for every channel of x");
  for (size_t i = 0; i < 3; ++i) require(out.shape(i) == x.shape(i), "out must have the shape of x");
  require(!overlap(x.data(), x.size(), out.data(), out.size()), "out must not overlap x");
  require(threads >= 1 && threads <= kMostThreads, "threads must be 1 to 1024");
  const Kernels& kernels = kernels_of(isa);
  const Geometry geometry = geometry_of(x, static_cast<int64_t>(weight.shape(1)), dilation, circular, mirrored);
  const Rows rows{static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1))};
  const nb::gil_scoped_release release;
  convolve(kernels, geometry, rows, x.data(), weight.data(), bias ? bias->data() : nullptr, out.data(), threads);
}

void weight_gradient_arrays(const Input& x, const Input& grad, const Array<float, 2>& weight_grad,
                            const std::optional<Array<float, 1>>& bias_grad, int64_t dilation, bool circular,
                            int threads, const std::string& isa) {
  require(weight_grad.shape(0) == x.shape(1), "weight_grad must have a row for every channel of x");
  require(!bias_grad || bias_grad->shape(0) == x.shape(1), "bias_grad must have a value for every channel of x");
  for (size_t i = 0; i < 3; ++i) require(grad.shape(i) == x.shape(i), "grad must have the shape of x");
  require(threads >= 1 && threads <= kMostThreads, "threads must be 1 to 1024");
  const Kernels& kernels = kernels_of(isa);
  const int64_t taps = static_cast<int64_t>(weight_grad.shape(1));
  const Geometry geometry = geometry_of(x, taps, dilation, circular, false);
  const Rows rows{static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1))};
  const nb::gil_scoped_release release;
  weight_gradient(kernels, geometry, rows, x.data(), grad.data(), weight_grad.data(),
                  bias_grad ? bias_grad->data() : nullptr, threads);
}

}  // namespace
}  // namespace pareto

NB_MODULE(_native, module) {
  module.doc() = "Depthwise dilated convolution for CPUs, forward and backward.";
  module.def("available", &pareto::available_names,
             "Names of the instruction sets that are available, the least first.");
  // Without noconvert an array of another type would be copied, and an output written to the copy.
  module.def(
      "convolve", &pareto::convolve_arrays, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert().none(),
      "out"_a.noconvert(), "dilation"_a, "circular"_a, "mirrored"_a = false, "threads"_a = 1, "isa"_a = "",
      "out (B, D, L) = the convolution of x (B, D, L) with weight (D, K), plus bias (D); mirrored: its transpose.");
  module.def("weight_gradient", &pareto::weight_gradient_arrays, "x"_a.noconvert(), "grad"_a.noconvert(),
             "weight_grad"_a.noconvert(), "bias_grad"_a.noconvert().none(), "dilation"_a, "circular"_a, "threads"_a = 1,
             "isa"_a = "", "Write the gradients with respect to weight (D, K) and bias (D) for grad (B, D, L).");
}
