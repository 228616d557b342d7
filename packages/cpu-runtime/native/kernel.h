// What a matrix-multiplication kernel is: one per row of the support matrix (table 3.1), each in a file of its own that
// alone is compiled for its instruction set.
//
// y = epilogue(x W^T) is computed in two steps. `prepare` (the prologue) turns rows of x into what the kernel
// multiplies with: int8 codes with a scale per group, bf16, or fp32. `multiply` takes any number of prepared rows
// through a range of panels. Both are pure functions of their arguments: threads split rows and panels among them, and
// a row's result is bitwise the same whatever the split and however many rows lie beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "packed.h"

namespace pareto {

enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu };

// What happens to a sum before it is stored: y = residual + activation(sum + bias), or, gated, activation(gate) * up.
struct Epilogue {
  const float* bias = nullptr;  // (panels * 64), 0 where there is no output
  Activation activation = Activation::none;
  // Each panel holds 2 x (16 gates, then the 16 ups beside them): 64 outputs make 32 values of y.
  bool gated = false;
  const float* residual = nullptr;  // rows as in y; may be y itself
  int64_t residual_stride = 0;
  float* y = nullptr;
  int64_t stride = 0;  // floats from a row of y to the next
};

// Inputs of a group at most where products of int8 are added up: 65536 * 255 * 127 is the last such sum that an int32
// holds.
constexpr int64_t kLongestInt8Group = 65536;

// Rows that are prepared and multiplied together; the last tile may be narrower.
constexpr int64_t kTileRows = 12;

struct Kernel {
  const char* name;     // as in table 3.1: "avx512_vnni"
  const char* compute;  // "int8", "fp32", "bf16", "fp16"
  Isa isa;
  bool (*supports)(const Packed& w);
  // Bytes of one prepared row; a tile of r rows takes r times as many, and tile t of a block starts at
  // 12 * t * row_bytes. A multiple of 4.
  int64_t (*row_bytes)(const Packed& w);
  // Prepare row `row` of a tile of `rows` rows (1 to 12): x (k) to its places in `tile`.
  void (*prepare)(const Packed& w, const float* x, int64_t row, int64_t rows, uint8_t* tile);
  // Bytes that each thread lends to `multiply`, 64-byte aligned.
  int64_t (*scratch_bytes)(const Packed& w);
  // All `m` prepared rows (tiles at `prepared`) through the panels [first, last).
  void (*multiply)(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
                   uint8_t* scratch);
};

// Every kernel that was compiled, best first: the first that is available and supports the weights is chosen.
const std::vector<const Kernel*>& kernels();

// The kernel called `name`, or the best for these weights where the name is "auto"; null where there is none.
// `compute` narrows "auto" to one compute type ("" for any).
const Kernel* choose(const Packed& w, const char* name, const char* compute);

}  // namespace pareto
