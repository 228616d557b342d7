// What the files that bind a program's steps share.
#pragma once

#include <algorithm>

#include "module.h"
#include "program.h"

namespace pareto {

using Floats = Array<const float, nb::ndim<1>>;
using Ints = Array<const int32_t, nb::ndim<1>>;

// A program with what keeps its arrays alive, and the limits that its input is checked against.
struct Decoder {
  Program program;
  std::vector<nb::object> kept;
  int64_t vocabulary = 0, outputs = 0, slots = 0, length = 0;  // 0: no limit known

  Decoder(std::shared_ptr<Pool> pool, int64_t max_rows) : program(std::move(pool), max_rows) {}
};

// Throw unless a step that is `width` wide can still be added to read or write `buffer`.
void check_buffer(const Decoder& decoder, int buffer, int64_t width);

// The values, kept alive, or null where there are none; throws unless there are `size`.
const float* vector_of(Decoder& decoder, const std::optional<Floats>& values, int64_t size, const char* what);

// Adds attention, caches and sampling to the module and to its class of programs.
void bind_attention(nb::module_& module, nb::class_<Decoder>& program);

// Adds exchanges between processes and the step that sums over them.
void bind_all_reduce(nb::module_& module, nb::class_<Decoder>& program);

}  // namespace pareto
