#include "cache.h"

#include <cstring>

namespace pareto {
namespace {

constexpr int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

constexpr int64_t element_bytes(CacheType type) {
  return type == CacheType::fp32 ? 4 : type == CacheType::bf16 ? 2 : 1;
}

}  // namespace

Cache::Cache(int64_t layers, int64_t slots, int64_t kv_heads, int64_t length, int64_t head_dim, CacheType type)
    : layers_(layers),
      slots_(slots),
      kv_heads_(kv_heads),
      length_(length),
      head_dim_(head_dim),
      type_(type),
      element_(element_bytes(type)),
      key_bytes_(rounded(rounded(length, kChunk) * key_width(type, head_dim) * element_, 64)),
      value_bytes_(rounded(length, kChunk) * value_width(head_dim) * element_),
      scale_bytes_(type == CacheType::int8 ? rounded(length, kChunk) * 4 : 0),
      plane_bytes_(key_bytes_ + value_bytes_ + 2 * scale_bytes_),
      block_(layers * slots * kv_heads * plane_bytes_) {}

Plane Cache::plane(int64_t layer, int64_t slot, int64_t kv_head) const {
  Plane plane;
  plane.keys = block_.data() + ((layer * slots_ + slot) * kv_heads_ + kv_head) * plane_bytes_;
  plane.values = plane.keys + key_bytes_;
  if (scale_bytes_) {
    plane.key_scales = reinterpret_cast<float*>(plane.values + value_bytes_);
    plane.value_scales = reinterpret_cast<float*>(plane.values + value_bytes_ + scale_bytes_);
  }
  return plane;
}

void Cache::copy(int64_t from, int64_t to, int64_t tokens) {
  if (from == to || tokens == 0) return;
  const size_t keys = static_cast<size_t>(rounded(tokens, kKeyTile) * key_width(type_, head_dim_) * element_);
  const size_t values = static_cast<size_t>(rounded(tokens, 2) * value_width(head_dim_) * element_);
  for (int64_t layer = 0; layer < layers_; ++layer)
    for (int64_t head = 0; head < kv_heads_; ++head) {
      const Plane source = plane(layer, from, head), target = plane(layer, to, head);
      std::memcpy(target.keys, source.keys, keys);
      std::memcpy(target.values, source.values, values);
      if (!scale_bytes_) continue;
      std::memcpy(target.key_scales, source.key_scales, static_cast<size_t>(tokens) * 4);
      std::memcpy(target.value_scales, source.value_scales, static_cast<size_t>(tokens) * 4);
    }
}

}  // namespace pareto
