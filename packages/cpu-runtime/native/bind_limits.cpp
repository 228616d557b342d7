// The machine's limits, measured by the same threads that run the kernels.
#include <chrono>

#include "limits.h"
#include "memory.h"
#include "module.h"

using namespace nb::literals;

namespace pareto {
namespace {

struct Job {
  const uint8_t* data;
  int64_t bytes, rounds;
  int64_t answers;
};

double seconds_of(Pool& pool, void (*work)(Team&, void*), Job& job) {
  const auto start = std::chrono::steady_clock::now();
  pool.run(work, &job);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds that the pool's threads take to read `bytes`, each its own part.
double read_seconds(Pool& pool, const Block& block) {
  nb::gil_scoped_release release;
  Job job{block.data(), block.bytes(), 0, 0};
  return seconds_of(
      pool,
      [](Team& team, void* context) {
        Job& j = *static_cast<Job*>(context);
        int64_t first, last;
        team.share(j.bytes / 4096, &first, &last);
        const int64_t answer = limits().read(j.data + first * 4096, (last - first) * 4096);
        __atomic_fetch_add(&j.answers, answer, __ATOMIC_RELAXED);
      },
      job);
}

double multiply_seconds(Pool& pool, int64_t rounds) {
  if (!limits().multiply) throw nb::value_error("this processor has no int8 instructions that a kernel here uses");
  nb::gil_scoped_release release;
  Job job{nullptr, 0, rounds, 0};
  return seconds_of(
      pool,
      [](Team&, void* context) {
        Job& j = *static_cast<Job*>(context);
        const int64_t answer = limits().multiply(j.rounds);
        __atomic_fetch_add(&j.answers, answer, __ATOMIC_RELAXED);
      },
      job);
}

}  // namespace

void bind_limits(nb::module_& module) {
  nb::class_<Block>(module, "Block", "Zeroed memory in huge pages where the system grants them.")
      .def(nb::init<int64_t>(), "bytes"_a)
      .def_prop_ro("bytes", &Block::bytes)
      .def(
          "array",
          [](Block& block) {
            return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(block.data(), {static_cast<size_t>(block.bytes())});
          },
          nb::rv_policy::reference_internal, "The bytes as a numpy array, which keeps the block alive.");
  module.def("read_seconds", &read_seconds, "pool"_a, "block"_a, "Seconds to read the block once on all threads.");
  module.def("multiply_seconds", &multiply_seconds, "pool"_a, "rounds"_a,
             "Seconds for that many rounds of int8 products on every thread.");
  module.attr("MULTIPLY_ADDS_PER_ROUND") = limits().multiply_adds;
}

}  // namespace pareto
