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
#include "norm.h"
#include "turn.h"

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

using Output = Array<float, 3>;

NormShape norm_shape(const Input& c, const Vector& weight, const Vector& bias, int threads) {
  require(c.shape(1) >= 1, "there must be at least one channel");
  require(weight.shape(0) == c.shape(1) && bias.shape(0) == c.shape(1),
          "weight and bias must have a value per channel");
  require(threads >= 1 && threads <= kMostThreads, "threads must be 1 to 1024");
  return {static_cast<int64_t>(c.shape(0)), static_cast<int64_t>(c.shape(1)), static_cast<int64_t>(c.shape(2))};
}

template <typename A>
void require_shape(const A& array, const Input& c) {
  for (size_t i = 0; i < 3; ++i) require(array.shape(i) == c.shape(i), "all of the arrays must have one shape");
}

template <typename A>
void require_places(const A& array, const Input& c) {
  require(array.shape(0) == c.shape(0) && array.shape(1) == c.shape(2), "mean and rstd must be (batch, length)");
}

void norm_silu_add_arrays(const Input& c, const Input& x, const Vector& weight, const Vector& bias, float epsilon,
                          const Output& out, const Array<float, 2>& mean, const Array<float, 2>& rstd, int threads,
                          const std::string& isa) {
  const NormShape shape = norm_shape(c, weight, bias, threads);
  require_shape(x, c);
  require_shape(out, c);
  require_places(mean, c);
  require_places(rstd, c);
  const Kernels& kernels = kernels_of(isa);
  const nb::gil_scoped_release release;
  norm_silu_add(kernels, shape, c.data(), x.data(), weight.data(), bias.data(), epsilon, out.data(), mean.data(),
                rstd.data(), threads);
}

void norm_silu_add_gradient_arrays(const Input& c, const Input& grad, const Vector& weight, const Vector& bias,
                                   const Weight& mean, const Weight& rstd, const Output& c_grad,
                                   const Array<float, 1>& weight_grad, const Array<float, 1>& bias_grad, int threads,
                                   const std::string& isa) {
  const NormShape shape = norm_shape(c, weight, bias, threads);
  require_shape(grad, c);
  require_shape(c_grad, c);
  require_places(mean, c);
  require_places(rstd, c);
  require(weight_grad.shape(0) == c.shape(1) && bias_grad.shape(0) == c.shape(1), "gradients must be (channels)");
  const Kernels& kernels = kernels_of(isa);
  const nb::gil_scoped_release release;
  norm_silu_add_gradient(kernels, shape, c.data(), grad.data(), weight.data(), bias.data(), mean.data(), rstd.data(),
                         c_grad.data(), weight_grad.data(), bias_grad.data(), threads);
}

void turn_arrays(const Input& x, const Output& out, int threads) {
  require(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(2) && out.shape(2) == x.shape(1),
          "out must have the shape of x with its last two dimensions exchanged");
  require(!overlap(x.data(), x.size(), out.data(), out.size()), "out must not overlap x");
  require(threads >= 1 && threads <= kMostThreads, "threads must be 1 to 1024");
  const TurnShape shape{static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)),
                        static_cast<int64_t>(x.shape(2))};
  const nb::gil_scoped_release release;
  turn(shape, x.data(), out.data(), threads);
}

}  // namespace
}  // namespace pareto

NB_MODULE(_native, module) {
  module.doc() = "Depthwise dilated convolution for CPUs and what follows it in a residual block, with gradients.";
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
  module.def("norm_silu_add", &pareto::norm_silu_add_arrays, "c"_a.noconvert(), "x"_a.noconvert(),
             "weight"_a.noconvert(), "bias"_a.noconvert(), "epsilon"_a, "out"_a.noconvert(), "mean"_a.noconvert(),
             "rstd"_a.noconvert(), "threads"_a = 1, "isa"_a = "",
             "out (B, D, L) = x + SiLU(layer norm of c over its channels); writes mean and rstd (B, L).");
  module.def("norm_silu_add_gradient", &pareto::norm_silu_add_gradient_arrays, "c"_a.noconvert(), "grad"_a.noconvert(),
             "weight"_a.noconvert(), "bias"_a.noconvert(), "mean"_a.noconvert(), "rstd"_a.noconvert(),
             "c_grad"_a.noconvert(), "weight_grad"_a.noconvert(), "bias_grad"_a.noconvert(), "threads"_a = 1,
             "isa"_a = "", "Write the gradients with respect to c, weight and bias for grad (B, D, L).");
  module.def("turn", &pareto::turn_arrays, "x"_a.noconvert(), "out"_a.noconvert(), "threads"_a = 1,
             "out (B, N, M) = x (B, M, N) with its last two dimensions exchanged.");
}
