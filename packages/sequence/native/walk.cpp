#include "walk.h"

#include <algorithm>
#include <cstring>

namespace pareto {

Geometry::Geometry(int64_t length, int64_t taps, int64_t dilation, Padding padding, bool mirrored)
    : length_(length), circular_(padding == Padding::circular) {
  const int64_t centre = circular_ ? (taps - 1) / 2 : taps - 1;
  const int64_t step = mirrored ? -dilation : dilation;
  for (int64_t k = 0; k < taps; ++k) {
    int64_t offset = (k - centre) * step;
    if (circular_) offset = (offset % length + length) % length;
    offsets_.push_back(offset);
  }
  const bool reads_before = !circular_ && !mirrored;
  seam_begin_ = reads_before ? -kBlock : std::max<int64_t>(length - kBlock, 0);
}

void Geometry::fill_seam(const float* row, float* seam) const {
  const int64_t first = std::max<int64_t>(-seam_begin_, 0);
  const int64_t copied = std::min(length_, kBlock), after = first + copied;
  std::memset(seam, 0, static_cast<size_t>(first) * sizeof(float));
  std::memcpy(seam + first, row + std::max<int64_t>(seam_begin_, 0), static_cast<size_t>(copied) * sizeof(float));
  if (!circular_) {
    std::memset(seam + after, 0, static_cast<size_t>(kSeam - after) * sizeof(float));
  } else if (length_ >= kBlock) {
    std::memcpy(seam + after, row, kBlock * sizeof(float));
  } else {
    for (int64_t i = after; i < kSeam; ++i) seam[i] = seam[i - length_];
  }
}

bool Walk::next(Stretch& stretch, int64_t* sources) {
  const int64_t length = geometry_.length(), left = length - done_;
  if (left <= 0) return false;
  int64_t begin = done_, blocks = left / kBlock;
  if (blocks == 0) {
    begin = std::max<int64_t>(length - kBlock, 0);
    blocks = 1;
  }
  stretch.skipped = 0;
  for (int64_t k = 0; k < geometry_.taps(); ++k) {
    int64_t from = begin + geometry_.offset(k);
    if (geometry_.circular() && from >= length) from -= length;
    if (from >= length) {
      stretch.skipped = k + 1;
    } else if (from + std::min(length, kBlock) <= 0) {
      stretch.skipped = k + 1;
      blocks = std::min(blocks, std::max<int64_t>(-kBlock - from, 0) / kBlock + 1);
    } else if (from >= 0 && from + kBlock <= length) {
      sources[k] = from;
      blocks = std::min(blocks, (length - kBlock - from) / kBlock + 1);
    } else {
      sources[k] = length + from - geometry_.seam_begin();
      blocks = 1;
    }
  }
  const int64_t end = std::min(begin + blocks * kBlock, length);
  stretch.begin = begin;
  stretch.blocks = blocks;
  stretch.fresh = end - done_;
  done_ = end;
  return true;
}

}  // namespace pareto
