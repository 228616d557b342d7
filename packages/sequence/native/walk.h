// A row of outputs cut into stretches, over which each tap reads from one place.
//
// Output t sums weight[k] * x[t + offset k]. Near the ends of the row, or where a circular source wraps, 64 positions
// of a tap are not contiguous in x. They are read from the row's seam instead: 128 values across the edge in question,
// copied once for each row, with the zeros before or after it, or with its other end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace pareto {

enum class Padding { causal, circular };

class Geometry {
 public:
  // `mirrored` reads after t what is otherwise read before it, as the gradient with respect to the input does.
  Geometry(int64_t length, int64_t taps, int64_t dilation, Padding padding, bool mirrored);

  int64_t length() const { return length_; }
  int64_t taps() const { return static_cast<int64_t>(offsets_.size()); }
  int64_t offset(int64_t tap) const { return offsets_[static_cast<size_t>(tap)]; }
  bool circular() const { return circular_; }

  // Which position of the row is the seam's first.
  int64_t seam_begin() const { return seam_begin_; }
  void fill_seam(const float* row, float* seam) const;

 private:
  int64_t length_, seam_begin_;
  bool circular_;
  std::vector<int64_t> offsets_;  // in [0, length) where circular
};

constexpr int64_t kSeam = 2 * kBlock;

// Outputs [begin, begin + blocks * kBlock). A row shorter than one block is one stretch of one block, which is then
// computed beyond the row's end; the last block of any other row ends with it, and may overlap the one before.
struct Stretch {
  int64_t begin = 0, blocks = 0;
  int64_t fresh = 0;  // outputs of it, the last ones, that no stretch before had; where shorter than a block, the first
  int64_t skipped = 0;  // this many taps, the first ones, read padding alone
};

// Goes through the stretches of a row in order; they are the same for every row.
class Walk {
 public:
  explicit Walk(const Geometry& geometry) : geometry_(geometry) {}

  // False at the row's end. Else sources[k], for the taps not skipped, is where tap k reads the stretch's first output
  // from: a position of the row, or the row's length plus a position of the seam.
  bool next(Stretch& stretch, int64_t* sources);

 private:
  const Geometry& geometry_;
  int64_t done_ = 0;
};

}  // namespace pareto
