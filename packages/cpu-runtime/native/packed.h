// The packed weight format: what lies in the file is what the kernels read.
//
// A matrix W of n outputs and k inputs, y = x W^T, is cut into panels of 64 outputs, stored one after the other; the last
// panel is filled up with zeros. Within a panel the inputs go by groups, which share a scale per output. One group is
//
//   scales    64 x fp16
//   zeros     64 x u8                                      (asymmetric weights only)
//   codes     ceil(group / 4) quads of inputs, each        u4: 128 bytes, u8: 256 bytes
//
// A quad holds 4 inputs of all 64 outputs. As u8, byte 4*c + j is input j of output c. As u4, byte 4*c + j of the first
// 64 bytes holds outputs c (low nibble) and 16 + c (high nibble), the other 64 bytes outputs 32 + c and 48 + c. Inputs
// that fill up the last quad of a group have the code of zero.
//
// Weights that are left unquantised, fp32 or bf16, lie in panels too: inputs one after the other, 64 outputs of each, and
// zeros that fill up the last quad. They have one group, k, and neither scales nor zeros.
//
// A weight is multiplier * scale * (code - zero); zero is 8 (u4) or 128 (u8) for symmetric weights. The multiplier is a
// power of two that brings the largest scale of the matrix into fp16's range: rounding is not touched.
#pragma once

#include <cstddef>
#include <cstdint>

// Files compiled for different instruction sets share these functions, and the linker would keep one copy for all: so
// there must never be a copy.
#define PARETO_INLINE __attribute__((always_inline)) inline

namespace pareto {

constexpr int64_t kPanel = 64;
constexpr int64_t kQuad = 4;

enum class Store : uint8_t { u4 = 4, u8 = 8, bf16 = 16, f32 = 32 };

PARETO_INLINE constexpr bool is_dense(Store store) { return store == Store::bf16 || store == Store::f32; }

struct Packed {
  int64_t n = 0, k = 0, group = 0;
  Store store = Store::u4;
  bool asymmetric = false;
  float multiplier = 1.0f;
  const uint8_t* data = nullptr;

  PARETO_INLINE bool dense() const { return is_dense(store); }
  PARETO_INLINE int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  PARETO_INLINE int64_t groups() const { return k / group; }
  PARETO_INLINE int64_t quads() const { return (group + kQuad - 1) / kQuad; }
  // Inputs with every group filled up to whole quads: the length of a quantised row.
  PARETO_INLINE int64_t padded_k() const { return groups() * quads() * kQuad; }
  PARETO_INLINE int64_t quad_bytes() const { return kPanel * kQuad * static_cast<int64_t>(store) / 8; }
  PARETO_INLINE int64_t header_bytes() const { return dense() ? 0 : kPanel * 2 + (asymmetric ? kPanel : 0); }
  PARETO_INLINE int64_t group_bytes() const { return header_bytes() + quads() * quad_bytes(); }
  PARETO_INLINE int64_t panel_bytes() const { return groups() * group_bytes(); }
  PARETO_INLINE int64_t bytes() const { return panels() * panel_bytes(); }
  PARETO_INLINE int32_t middle() const { return store == Store::u4 ? 8 : 128; }
};

// Write the panels of `shape` (whose data is ignored) to `out`, `shape.bytes()` long.
// codes (n, k) u8, scales (n, groups) fp16 bits, zeros (n, groups) u8 or null where symmetric; all row-major.
void pack(const Packed& shape, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, uint8_t* out);

// The inverse of pack.
void unpack(const Packed& packed, uint8_t* codes, uint16_t* scales, uint8_t* zeros);

// The same for unquantised weights: values (n, k), row-major, fp32 or bf16 as the store says.
void pack_dense(const Packed& shape, const void* values, uint8_t* out);
void unpack_dense(const Packed& packed, void* values);

}  // namespace pareto
