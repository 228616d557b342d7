// What the parts of the Python module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "packed.h"
#include "pool.h"

namespace nb = nanobind;

namespace pareto {

// Arrays come and go through DLPack, so any tensor library's do, and none is linked against.
template <typename T, typename... Shape>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu, Shape...>;

// A weight matrix in panels, and what keeps the memory that it lies in.
struct Weight {
  Packed packed;
  nb::object owner;
};

void bind_program(nb::module_& module);
void bind_limits(nb::module_& module);

}  // namespace pareto
