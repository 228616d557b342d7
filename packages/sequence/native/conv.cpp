#include "conv.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace pareto {
namespace {

// Rows that are taken through the stretches together, so that where the taps read is worked out once for them all:
// fewer where they are long, since each should still be in the cache for its next stretch.
int64_t rows_together(int64_t length) { return std::clamp<int64_t>((int64_t{1} << 15) / length, 1, 8); }

// What one thread needs for `together` rows.
struct Scratch {
  std::vector<int64_t> sources;
  std::vector<const float*> pointers;
  std::vector<float> seams, block;

  Scratch(int64_t taps, int64_t together)
      : sources(static_cast<size_t>(taps)),
        pointers(static_cast<size_t>(taps)),
        seams(static_cast<size_t>(together * kSeam)),
        block(static_cast<size_t>(together * kBlock)) {}

  float* seam(int64_t row) { return seams.data() + row * kSeam; }

  // Where each tap of a stretch reads from for one row, the skipped ones left out.
  const float* const* point(const Geometry& geometry, const Stretch& stretch, const float* x, const float* seam) {
    const int64_t length = geometry.length();
    for (int64_t k = stretch.skipped; k < geometry.taps(); ++k) {
      const int64_t from = sources[static_cast<size_t>(k)];
      pointers[static_cast<size_t>(k)] = from < length ? x + from : seam + (from - length);
    }
    return pointers.data() + stretch.skipped;
  }
};

struct Forward {
  const Kernels& kernels;
  const Geometry& geometry;
  Rows rows;
  const float *x, *weight, *bias;
  float* y;
  int64_t together;
  std::vector<Scratch> scratch;

  void run_rows(int slot, int64_t item) {
    Scratch& own = scratch[static_cast<size_t>(slot)];
    const int64_t length = geometry.length();
    const int64_t first = item * together, last = std::min(first + together, rows.batch * rows.width);
    for (int64_t row = first; row < last; ++row) geometry.fill_seam(x + row * length, own.seam(row - first));
    Walk walk(geometry);
    for (Stretch stretch; walk.next(stretch, own.sources.data());)
      for (int64_t row = first; row < last; ++row) run_row(own, stretch, row, own.seam(row - first));
  }

  void run_row(Scratch& own, const Stretch& stretch, int64_t row, const float* seam) {
    const int64_t length = geometry.length(), taps = geometry.taps(), channel = row % rows.width;
    const float* const* source = own.point(geometry, stretch, x + row * length, seam);
    const float* weights = weight + channel * taps + stretch.skipped;
    const float start = bias ? bias[channel] : 0.0f;
    const bool fits = length >= kBlock;
    float* to = fits ? y + row * length + stretch.begin : own.block.data();
    kernels.run(to, source, weights, taps - stretch.skipped, start, stretch.blocks);
    if (!fits) std::memcpy(y + row * length, to, static_cast<size_t>(length) * sizeof(float));
  }
};

// Blocks whose products are summed in fp32 before they go to a sum in double: the error does not grow with the length.
constexpr int64_t kBlocksInSingle = 64;

// Inner products of one channel: lanes of fp32, and the totals that they are emptied into.
struct Totals {
  std::vector<float> lanes;
  std::vector<double> totals;
  int64_t blocks = 0;  // in the lanes

  Totals(int64_t taps) : lanes(static_cast<size_t>(taps * kMostLanes)), totals(static_cast<size_t>(taps)) {}

  void empty(int count) {
    for (size_t k = 0; k < totals.size(); ++k) {
      float* of_tap = lanes.data() + k * static_cast<size_t>(count);
      for (int i = 0; i < count; ++i) totals[k] += static_cast<double>(of_tap[i]);
    }
    std::fill(lanes.begin(), lanes.end(), 0.0f);
    blocks = 0;
  }
};

struct Backward {
  const Kernels& kernels;
  const Geometry& geometry;
  Rows rows;
  const float *x, *grad;
  float *weight_grad, *bias_grad;
  int64_t together;
  std::vector<Scratch> scratch;
  std::vector<Totals> totals;

  void run_channel(int slot, int64_t channel) {
    Scratch& own = scratch[static_cast<size_t>(slot)];
    Totals& sums = totals[static_cast<size_t>(slot)];
    std::fill(sums.totals.begin(), sums.totals.end(), 0.0);
    double bias_total = 0;
    for (int64_t first = 0; first < rows.batch; first += together) {
      const int64_t last = std::min(first + together, rows.batch);
      for (int64_t b = first; b < last; ++b) {
        prepare(own, b - first, row_of(b, channel));
        if (bias_grad) bias_total += kernels.sum(grad + row_of(b, channel), geometry.length());
      }
      Walk walk(geometry);
      for (Stretch stretch; walk.next(stretch, own.sources.data());)
        for (int64_t b = first; b < last; ++b) add_row(own, sums, stretch, b - first, row_of(b, channel));
    }
    sums.empty(kernels.lanes);
    for (int64_t k = 0; k < geometry.taps(); ++k)
      weight_grad[channel * geometry.taps() + k] = static_cast<float>(sums.totals[static_cast<size_t>(k)]);
    if (bias_grad) bias_grad[channel] = static_cast<float>(bias_total);
  }

  // Where the row of that sequence and channel begins.
  int64_t row_of(int64_t b, int64_t channel) const { return (b * rows.width + channel) * geometry.length(); }

  // The seam, and the row's last block of gradients with zeros for those that the block before it has too.
  void prepare(Scratch& own, int64_t index, int64_t row) {
    const int64_t length = geometry.length(), rest = length % kBlock;
    geometry.fill_seam(x + row, own.seam(index));
    float* block = own.block.data() + index * kBlock;
    std::memset(block, 0, kBlock * sizeof(float));
    float* to = length < kBlock ? block : block + (kBlock - rest);
    std::memcpy(to, grad + row + (length - rest), static_cast<size_t>(rest) * sizeof(float));
  }

  void add_row(Scratch& own, Totals& sums, const Stretch& stretch, int64_t index, int64_t row) {
    const int64_t taps = geometry.taps() - stretch.skipped;
    const float* const* source = own.point(geometry, stretch, x + row, own.seam(index));
    float* lanes = sums.lanes.data() + stretch.skipped * kernels.lanes;
    const bool whole = stretch.fresh == stretch.blocks * kBlock;
    const float* grads = whole ? grad + row + stretch.begin : own.block.data() + index * kBlock;
    for (int64_t done = 0; done < stretch.blocks;) {
      const int64_t blocks = std::min(stretch.blocks - done, kBlocksInSingle - sums.blocks);
      kernels.dots(grads + done * kBlock, source, done * kBlock, taps, blocks, lanes);
      done += blocks;
      sums.blocks += blocks;
      if (sums.blocks == kBlocksInSingle) sums.empty(kernels.lanes);
    }
  }
};

}  // namespace

void convolve(const Kernels& kernels, const Geometry& geometry, Rows rows, const float* x, const float* weight,
              const float* bias, float* y, int threads) {
  const int64_t together = rows_together(geometry.length());
  const std::vector<Scratch> scratch(static_cast<size_t>(threads), Scratch(geometry.taps(), together));
  Forward forward{kernels, geometry, rows, x, weight, bias, y, together, scratch};
  share_out(
      threads, (rows.batch * rows.width + together - 1) / together,
      [](int slot, int64_t item, void* context) { static_cast<Forward*>(context)->run_rows(slot, item); }, &forward);
}

void weight_gradient(const Kernels& kernels, const Geometry& geometry, Rows rows, const float* x, const float* grad,
                     float* weight_grad, float* bias_grad, int threads) {
  const int64_t together = std::min(rows_together(geometry.length()), std::max<int64_t>(rows.batch, 1));
  const std::vector<Scratch> scratch(static_cast<size_t>(threads), Scratch(geometry.taps(), together));
  const std::vector<Totals> totals(static_cast<size_t>(threads), Totals(geometry.taps()));
  Backward backward{kernels, geometry, rows, x, grad, weight_grad, bias_grad, together, scratch, totals};
  share_out(
      threads, rows.width,
      [](int slot, int64_t item, void* context) { static_cast<Backward*>(context)->run_channel(slot, item); },
      &backward);
}

}  // namespace pareto
