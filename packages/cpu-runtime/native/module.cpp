// The Python module: arrays come and go through DLPack, so any tensor library's do, and none is linked against.
#include "module.h"

#include <sched.h>

#include <algorithm>

#include "isa.h"
#include "linear.h"
#include "memory.h"

using namespace nb::literals;
using namespace pareto;

namespace {

Packed shape_of(int64_t n, int64_t k, int64_t group, int bits, bool asymmetric, float multiplier) {
  constexpr int64_t kMost = int64_t{1} << 29;
  if (n < 1 || k < 1 || n > kMost || k > kMost) throw nb::value_error("n and k must be at least 1 and at most 2^29");
  if (group < 1 || k % group != 0) throw nb::value_error("group must divide k");
  if (bits != 4 && bits != 8 && bits != 16 && bits != 32)
    throw nb::value_error("bits must be 4 or 8, or 16 (bf16) or 32 (fp32) where nothing is quantised");
  if (bits > 8 && (group != k || asymmetric || multiplier != 1.0f))
    throw nb::value_error("bf16 and fp32 weights have group k, no zero points and the multiplier 1");
  Packed packed;
  packed.n = n;
  packed.k = k;
  packed.group = group;
  packed.store = static_cast<Store>(bits);
  packed.asymmetric = asymmetric;
  packed.multiplier = multiplier;
  return packed;
}

Weight weight_of(Array<uint8_t, nb::ndim<1>> data, int64_t n, int64_t k, int64_t group, int bits, bool asymmetric,
                 float multiplier) {
  Weight weight{shape_of(n, k, group, bits, asymmetric, multiplier), nb::cast(data)};
  if (static_cast<int64_t>(data.size()) != weight.packed.bytes())
    throw nb::value_error(("packed data has " + std::to_string(data.size()) + " bytes, its shape asks for " +
                           std::to_string(weight.packed.bytes()))
                              .c_str());
  weight.packed.data = data.data();
  return weight;
}

void pack_into(Array<const uint8_t, nb::ndim<2>> codes, Array<const uint16_t, nb::ndim<2>> scales,
               std::optional<Array<const uint8_t, nb::ndim<2>>> zeros, int bits, Array<uint8_t, nb::ndim<1>> out) {
  const int64_t n = static_cast<int64_t>(codes.shape(0)), k = static_cast<int64_t>(codes.shape(1));
  const int64_t groups = static_cast<int64_t>(scales.shape(1));
  if (bits > 8) throw nb::value_error("bf16 and fp32 weights are packed by pack_dense");
  if (groups < 1 || k % groups != 0) throw nb::value_error("the scales' second dimension must divide k");
  const Packed packed = shape_of(n, k, k / groups, bits, zeros.has_value(), 1.0f);
  if (static_cast<int64_t>(scales.shape(0)) != n) throw nb::value_error("scales must have a row per output");
  if (zeros && (static_cast<int64_t>(zeros->shape(0)) != n || static_cast<int64_t>(zeros->shape(1)) != groups))
    throw nb::value_error("zeros must have the shape of scales");
  const auto too_large = [&](const auto& array) {
    return bits == 4 && std::any_of(array.data(), array.data() + array.size(), [](uint8_t code) { return code > 15; });
  };
  if (too_large(codes) || (zeros && too_large(*zeros))) throw nb::value_error("codes and zeros of 4 bits end at 15");
  if (static_cast<int64_t>(out.size()) != packed.bytes()) throw nb::value_error("out has the wrong size");
  nb::gil_scoped_release release;
  pack(packed, codes.data(), scales.data(), zeros ? zeros->data() : nullptr, out.data());
}

void unpack_into(const Weight& weight, Array<uint8_t, nb::ndim<2>> codes, Array<uint16_t, nb::ndim<2>> scales,
                 std::optional<Array<uint8_t, nb::ndim<2>>> zeros) {
  const Packed& packed = weight.packed;
  if (packed.dense()) throw nb::value_error("bf16 and fp32 weights are unpacked by unpack_dense");
  const auto fits = [](const auto& array, int64_t rows, int64_t columns) {
    return static_cast<int64_t>(array.shape(0)) == rows && static_cast<int64_t>(array.shape(1)) == columns;
  };
  if (!fits(codes, packed.n, packed.k) || !fits(scales, packed.n, packed.groups()) ||
      packed.asymmetric != zeros.has_value() || (zeros && !fits(*zeros, packed.n, packed.groups())))
    throw nb::value_error("codes, scales and zeros must have the weight's shapes");
  unpack(packed, codes.data(), scales.data(), zeros ? zeros->data() : nullptr);
}

// The store of unquantised values of this type.
Store dense_store(const nb::dlpack::dtype& type) {
  if (type == nb::dtype<float>()) return Store::f32;
  if (type == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}) return Store::bf16;
  throw nb::value_error("unquantised weights must be fp32 or bf16");
}

using Values = nb::ndarray<nb::c_contig, nb::device::cpu, nb::ndim<2>>;

void pack_dense_into(Values values, Array<uint8_t, nb::ndim<1>> out) {
  const int64_t n = static_cast<int64_t>(values.shape(0)), k = static_cast<int64_t>(values.shape(1));
  const Packed packed = shape_of(n, k, k, static_cast<int>(dense_store(values.dtype())), false, 1.0f);
  if (static_cast<int64_t>(out.size()) != packed.bytes()) throw nb::value_error("out has the wrong size");
  nb::gil_scoped_release release;
  pack_dense(packed, values.data(), out.data());
}

void unpack_dense_into(const Weight& weight, Values values) {
  const Packed& packed = weight.packed;
  if (dense_store(values.dtype()) != packed.store || static_cast<int64_t>(values.shape(0)) != packed.n ||
      static_cast<int64_t>(values.shape(1)) != packed.k)
    throw nb::value_error("values must have the weight's type and shape");
  unpack_dense(packed, values.data());
}

// y = x W^T by one kernel: what the tests and the kernel benchmarks call. Models run by programs.
struct Multiply {
  const Kernel* kernel;
  const Packed* w;
  const float* x;
  int64_t m, x_stride;
  Epilogue epilogue;
  Workspace workspace;
  int64_t repeats;
};

void multiply(Pool& pool, const Weight& weight, Array<const float, nb::ndim<2>> x, Array<float, nb::ndim<2>> y,
              const std::string& kernel_name, const std::string& compute, int64_t repeats) {
  const Packed& w = weight.packed;
  const Kernel* kernel = choose(w, kernel_name.c_str(), compute.c_str());
  if (!kernel) throw nb::value_error(("no kernel '" + kernel_name + "' for these weights on this processor").c_str());
  const int64_t m = static_cast<int64_t>(x.shape(0));
  if (static_cast<int64_t>(x.shape(1)) != w.k) throw nb::value_error("x must have k columns");
  if (static_cast<int64_t>(y.shape(0)) != m || static_cast<int64_t>(y.shape(1)) != w.n)
    throw nb::value_error("y must be (rows of x, n)");
  const int64_t shared = shared_bytes(*kernel, w, m), per_thread = (thread_bytes(*kernel, w) + 127) / 64 * 64;
  Block block(shared + per_thread * pool.threads() + 128);
  Multiply job{kernel, &w, x.data(), m, w.k, {}, {block.data(), block.data() + (shared + 63) / 64 * 64, per_thread},
               repeats};
  job.epilogue.y = y.data();
  job.epilogue.stride = w.n;
  nb::gil_scoped_release release;
  pool.run(
      [](Team& team, void* context) {
        const Multiply& j = *static_cast<Multiply*>(context);
        for (int64_t i = 0; i < j.repeats; ++i) {
          if (i) team.barrier();
          linear(team, *j.kernel, *j.w, {}, j.x, j.x_stride, j.m, j.epilogue, j.workspace);
        }
      },
      &job);
}

std::vector<std::vector<std::string>> kernel_table() {
  std::vector<std::vector<std::string>> rows;
  for (const Kernel* kernel : kernels())
    rows.push_back({kernel->name, kernel->compute, available(kernel->isa) ? "yes" : "no"});
  return rows;
}

}  // namespace

NB_MODULE(_native, module) {
  module.def("available", &available_names, "Names of the instruction sets that this processor and system offer.");
  module.def("kernels", &kernel_table, "Every compiled kernel, best first: name, compute type, whether it runs here.");
  nb::class_<Pool>(module, "Pool")
      .def(nb::new_([](int threads, std::vector<int> cpus, bool bind_caller) {
             if (threads < 1 || threads > kMostThreads)
               throw nb::value_error(("threads must be 1 to " + std::to_string(kMostThreads)).c_str());
             if (std::any_of(cpus.begin(), cpus.end(), [](int cpu) { return cpu < 0 || cpu >= CPU_SETSIZE; }))
               throw nb::value_error("cpus must be numbers of CPUs, 0 to 1023");
             return std::make_shared<Pool>(threads, std::move(cpus), bind_caller);
           }),
           "threads"_a, "cpus"_a = std::vector<int>{}, "bind_caller"_a = false)
      .def_prop_ro("threads", &Pool::threads);
  nb::class_<Weight>(module, "Weight")
      .def_static("of", &weight_of, "data"_a, "n"_a, "k"_a, "group"_a, "bits"_a = 4, "asymmetric"_a = false,
                  "multiplier"_a = 1.0f)
      .def("unpack", &unpack_into, "codes"_a, "scales"_a, "zeros"_a = nb::none())
      .def("unpack_dense", &unpack_dense_into, "values"_a);
  module.def(
      "packed_bytes",
      [](int64_t n, int64_t k, int64_t group, int bits, bool asymmetric) {
        return shape_of(n, k, group, bits, asymmetric, 1.0f).bytes();
      },
      "n"_a, "k"_a, "group"_a, "bits"_a = 4, "asymmetric"_a = false);
  module.def("pack", &pack_into, "codes"_a, "scales"_a, "zeros"_a.none(), "bits"_a, "out"_a);
  module.def("pack_dense", &pack_dense_into, "values"_a, "out"_a);
  module.attr("MOST_THREADS") = kMostThreads;
  bind_program(module);
  bind_limits(module);
  module.def("multiply", &multiply, "pool"_a, "weight"_a, "x"_a, "y"_a, "kernel"_a = "auto", "compute"_a = "",
             "repeats"_a = 1);
}
