// Keys and values of every token that was seen, preallocated: (layers, slots, kv_heads, length, head_dim).
//
// A plane is what one key-value head of one layer keeps for one slot:
//
//   keys          tiles of 16 positions, each (key_width, 16): a dot product runs with 16 positions beside each other
//   values        (length, value_width), head_dim filled up with zeros to a multiple of 16
//   key scales    (length) fp32, int8 only: key = scale * code, one scale per position and head
//   value scales  (length) fp32, int8 only
//
// In bf16 what the products sum over lies in pairs, as the processors' bf16 products take them: keys as
// (key_width / 2, 16, 2) with head_dim filled up to an even width, values as (length / 2, value_width, 2).
// Lengths are filled up to whole chunks: attention works on chunks of 128 positions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"

namespace pareto {

constexpr int64_t kKeyTile = 16;
constexpr int64_t kChunk = 128;

enum class CacheType : uint8_t { fp32, bf16, int8 };

struct Plane {
  uint8_t* keys = nullptr;
  uint8_t* values = nullptr;
  float* key_scales = nullptr;  // null but for int8
  float* value_scales = nullptr;
};

constexpr int64_t key_width(CacheType type, int64_t head_dim) {
  return type == CacheType::bf16 ? (head_dim + 1) / 2 * 2 : head_dim;
}
constexpr int64_t value_width(int64_t head_dim) { return (head_dim + kKeyTile - 1) / kKeyTile * kKeyTile; }

class Cache {
 public:
  Cache(int64_t layers, int64_t slots, int64_t kv_heads, int64_t length, int64_t head_dim, CacheType type);

  int64_t layers() const { return layers_; }
  int64_t slots() const { return slots_; }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t length() const { return length_; }
  int64_t head_dim() const { return head_dim_; }
  CacheType type() const { return type_; }
  int64_t bytes() const { return block_.bytes(); }

  Plane plane(int64_t layer, int64_t slot, int64_t kv_head) const;

  // Slot `to` gets the first `tokens` positions of slot `from`, in every layer.
  void copy(int64_t from, int64_t to, int64_t tokens);

 private:
  int64_t layers_, slots_, kv_heads_, length_, head_dim_;
  CacheType type_;
  int64_t element_, key_bytes_, value_bytes_, scale_bytes_, plane_bytes_;
  Block block_;
};

}  // namespace pareto
