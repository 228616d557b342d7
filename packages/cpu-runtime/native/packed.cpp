#include "packed.h"

#include <cstring>

namespace pareto {
namespace {

// Where the codes of output `column` (within its panel) lie within each quad: four bytes in a row, one nibble of them
// or all.
struct Place {
  int64_t byte;
  int shift;
};

Place place(Store store, int64_t column) {
  if (store == Store::u8) return {column * kQuad, 0};
  const int64_t pair = column / 32, in_pair = column % 32;
  return {pair * kPanel + (in_pair % 16) * kQuad, in_pair < 16 ? 0 : 4};
}

int64_t dense_place(const Packed& packed, int64_t row, int64_t input) {
  return (row / kPanel * packed.quads() * kQuad + input) * kPanel + row % kPanel;
}

template <typename Value>
void pack_values(const Packed& shape, const void* values, uint8_t* out) {
  const Value* source = static_cast<const Value*>(values);
  for (int64_t row = 0; row < shape.n; ++row)
    for (int64_t input = 0; input < shape.k; ++input)
      std::memcpy(out + dense_place(shape, row, input) * static_cast<int64_t>(sizeof(Value)),
                  source + row * shape.k + input, sizeof(Value));
}

template <typename Value>
void unpack_values(const Packed& packed, void* values) {
  Value* to = static_cast<Value*>(values);
  for (int64_t row = 0; row < packed.n; ++row)
    for (int64_t input = 0; input < packed.k; ++input)
      std::memcpy(to + row * packed.k + input,
                  packed.data + dense_place(packed, row, input) * static_cast<int64_t>(sizeof(Value)), sizeof(Value));
}

}  // namespace

void pack(const Packed& shape, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, uint8_t* out) {
  const int64_t groups = shape.groups(), padded = shape.quads() * kQuad, quad_bytes = shape.quad_bytes();
  std::memset(out, 0, static_cast<size_t>(shape.bytes()));
  for (int64_t panel = 0; panel < shape.panels(); ++panel) {
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* header = out + panel * shape.panel_bytes() + g * shape.group_bytes();
      uint8_t* quads = header + shape.header_bytes();
      for (int64_t column = 0; column < kPanel; ++column) {
        const int64_t row = panel * kPanel + column;
        const bool real = row < shape.n;
        const uint8_t zero = shape.asymmetric && real ? zeros[row * groups + g] : static_cast<uint8_t>(shape.middle());
        const uint16_t scale = real ? scales[row * groups + g] : 0;
        std::memcpy(header + 2 * column, &scale, 2);
        if (shape.asymmetric) header[2 * kPanel + column] = zero;
        const Place at = place(shape.store, column);
        const uint8_t* source = codes + row * shape.k + g * shape.group;
        const int64_t inputs = real ? shape.group : 0;
        uint8_t* to = quads + at.byte;
        for (int64_t first = 0; first < padded; first += kQuad, to += quad_bytes)
          for (int64_t lane = 0; lane < kQuad; ++lane) {
            const uint8_t code = first + lane < inputs ? source[first + lane] : zero;
            to[lane] = static_cast<uint8_t>(to[lane] | (code << at.shift));
          }
      }
    }
  }
}

void unpack(const Packed& packed, uint8_t* codes, uint16_t* scales, uint8_t* zeros) {
  const int64_t groups = packed.groups(), quad_bytes = packed.quad_bytes();
  const uint8_t mask = packed.store == Store::u4 ? 0x0f : 0xff;
  for (int64_t row = 0; row < packed.n; ++row) {
    const int64_t panel = row / kPanel, column = row % kPanel;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* header = packed.data + panel * packed.panel_bytes() + g * packed.group_bytes();
      const uint8_t* quads = header + packed.header_bytes();
      std::memcpy(scales + row * groups + g, header + 2 * column, 2);
      if (packed.asymmetric) zeros[row * groups + g] = header[2 * kPanel + column];
      const Place at = place(packed.store, column);
      uint8_t* to = codes + row * packed.k + g * packed.group;
      for (int64_t input = 0; input < packed.group; ++input) {
        const uint8_t byte = quads[input / kQuad * quad_bytes + at.byte + input % kQuad];
        to[input] = static_cast<uint8_t>((byte >> at.shift) & mask);
      }
    }
  }
}

void pack_dense(const Packed& shape, const void* values, uint8_t* out) {
  std::memset(out, 0, static_cast<size_t>(shape.bytes()));
  if (shape.store == Store::f32) return pack_values<uint32_t>(shape, values, out);
  pack_values<uint16_t>(shape, values, out);
}

void unpack_dense(const Packed& packed, void* values) {
  if (packed.store == Store::f32) return unpack_values<uint32_t>(packed, values);
  unpack_values<uint16_t>(packed, values);
}

}  // namespace pareto
