// Exchanges between processes, and the step that sums over them, as Python uses them.
#include "all_reduce.h"
#include "bind_program.h"

using namespace nb::literals;

namespace pareto {
namespace {

// The exchange with what keeps its memory.
struct SharedExchange {
  std::shared_ptr<Exchange> exchange;
  nb::object owner;
};

SharedExchange make_exchange(Array<uint8_t, nb::ndim<1>> memory, int ranks, int rank, int64_t floats,
                             double timeout_s) {
  if (ranks < 1 || rank < 0 || rank >= ranks) throw nb::value_error("rank must be below ranks, both at least 0 and 1");
  if (floats < 1 || floats > (int64_t{1} << 40)) throw nb::value_error("floats must be 1 to 2^40");
  if (!(timeout_s > 0)) throw nb::value_error("timeout_s must be above 0");
  if (static_cast<int64_t>(memory.size()) < Exchange::bytes(ranks, floats))
    throw nb::value_error("memory is smaller than exchange_bytes(ranks, floats)");
  if (reinterpret_cast<uintptr_t>(memory.data()) % 64 != 0) throw nb::value_error("memory must be aligned to 64 bytes");
  return {std::make_shared<Exchange>(memory.data(), ranks, rank, floats, timeout_s), nb::cast(memory)};
}

void add_all_reduce(Decoder& decoder, const SharedExchange& shared, int x, int residual, int y) {
  const int64_t width = decoder.program.width(y);
  for (int buffer : {x, residual, y}) check_buffer(decoder, buffer, width);
  if (x == y || x == residual) throw nb::value_error("x must be a buffer of its own");
  if (width * decoder.program.max_rows() > shared.exchange->floats())
    throw nb::value_error("the exchange is made for fewer floats than max_rows rows of these buffers");
  decoder.kept.push_back(shared.owner);
  decoder.program.add(all_reduce_step(shared.exchange, x, residual, y));
}

}  // namespace

void bind_all_reduce(nb::module_& module, nb::class_<Decoder>& program) {
  nb::class_<SharedExchange>(module, "Exchange")
      .def(nb::new_(&make_exchange), "memory"_a, "ranks"_a, "rank"_a, "floats"_a, "timeout_s"_a = 30.0)
      .def("stop", [](SharedExchange& shared) { shared.exchange->stop(); })
      .def_prop_ro("stopped", [](const SharedExchange& shared) { return shared.exchange->stopped(); });
  module.def("exchange_bytes", &Exchange::bytes, "ranks"_a, "floats"_a);
  program.def("all_reduce", &add_all_reduce, "exchange"_a, "x"_a, "residual"_a, "y"_a,
              "y = residual + the sum over all processes of x, bitwise the same in each.");
}

}  // namespace pareto
