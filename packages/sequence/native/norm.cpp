#include "norm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace pareto {
namespace {

// Values of a tile: with its copies it stays in a core's second cache.
constexpr int64_t kTileValues = 1 << 15;
// Pieces that a sequence's tiles are shared out in: gradients of weights are summed piece by piece, in order.
constexpr int64_t kPieces = 32;

int64_t tile_length(int64_t width) { return std::clamp<int64_t>(kTileValues / width / kMostLanes, 1, 16) * kMostLanes; }

// Goes over tiles of `length` positions; what is left at the end, shorter than a vector, comes in a copy filled up with
// zeros.
struct Tiles {
  NormShape shape;
  int64_t length, count, pieces;

  explicit Tiles(NormShape of) : shape(of), length(tile_length(of.width)) {
    count = (shape.length + length - 1) / length;
    pieces = std::min(count, kPieces);
  }

  int64_t first(int64_t piece) const { return count * piece / pieces; }
  int64_t positions(int64_t tile) const { return std::min(length, shape.length - tile * length); }
};

// A thread's copies: `rows` arrays of a tile each, and what `extra` floats it needs beside.
struct Space {
  std::vector<float> packed, edge;

  Space(const Tiles& tiles, int64_t arrays)
      : packed(static_cast<size_t>(arrays * (tiles.shape.width + 1) * tiles.length)),
        edge(static_cast<size_t>((2 * tiles.shape.width + 2) * kMostLanes)) {}
};

void gather(const float* from, int64_t stride, int64_t rows, int64_t count, float* to) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * kMostLanes, from + row * stride, static_cast<size_t>(count) * sizeof(float));
    std::fill(to + row * kMostLanes + count, to + (row + 1) * kMostLanes, 0.0f);
  }
}

void scatter(const float* from, int64_t stride, int64_t rows, int64_t count, float* to) {
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(to + row * stride, from + row * kMostLanes, static_cast<size_t>(count) * sizeof(float));
}

struct Forward {
  const Kernels& kernels;
  Tiles tiles;
  NormTile tile;  // count and stride are set for each
  const float *c, *x;
  float *y, *mean, *rstd;
  std::vector<Space> spaces;

  void run(int slot, int64_t item) {
    const int64_t b = item / tiles.pieces, piece = item % tiles.pieces;
    for (int64_t number = tiles.first(piece); number < tiles.first(piece + 1); ++number) {
      const int64_t count = tiles.positions(number), whole = count / kMostLanes * kMostLanes;
      const int64_t begin = number * tiles.length;
      if (whole) run_whole(spaces[static_cast<size_t>(slot)], b, begin, whole);
      if (count > whole) run_edge(spaces[static_cast<size_t>(slot)], b, begin + whole, count - whole);
    }
  }

  void run_whole(Space& space, int64_t b, int64_t begin, int64_t count) {
    const int64_t at = b * tiles.shape.width * tiles.shape.length + begin, place = b * tiles.shape.length + begin;
    NormTile own = tile;
    own.count = count;
    own.stride = tiles.shape.length;
    kernels.norm_forward(own, c + at, x + at, y + at, space.packed.data(), mean + place, rstd + place);
  }

  void run_edge(Space& space, int64_t b, int64_t begin, int64_t count) {
    const int64_t width = tiles.shape.width, stride = tiles.shape.length, at = b * width * stride + begin;
    float* of_c = space.edge.data();
    float* of_x = of_c + width * kMostLanes;
    float* statistics = of_x + width * kMostLanes;
    gather(c + at, stride, width, count, of_c);
    gather(x + at, stride, width, count, of_x);
    NormTile own = tile;
    own.count = own.stride = kMostLanes;
    kernels.norm_forward(own, of_c, of_x, of_x, space.packed.data(), statistics, statistics + kMostLanes);
    scatter(of_x, stride, width, count, y + at);
    scatter(statistics, 0, 1, count, mean + b * stride + begin);
    scatter(statistics + kMostLanes, 0, 1, count, rstd + b * stride + begin);
  }
};

struct Backward {
  const Kernels& kernels;
  Tiles tiles;
  NormTile tile;
  const float *c, *grad, *mean, *rstd;
  float* c_grad;
  std::vector<float> sums;  // (items, 2, width)
  std::vector<Space> spaces;

  void run(int slot, int64_t item) {
    const int64_t b = item / tiles.pieces, piece = item % tiles.pieces;
    float* weight_grad = sums.data() + item * 2 * tiles.shape.width;
    for (int64_t number = tiles.first(piece); number < tiles.first(piece + 1); ++number) {
      const int64_t count = tiles.positions(number), whole = count / kMostLanes * kMostLanes;
      const int64_t begin = number * tiles.length;
      if (whole) run_whole(spaces[static_cast<size_t>(slot)], b, begin, whole, weight_grad);
      if (count > whole) run_edge(spaces[static_cast<size_t>(slot)], b, begin + whole, count - whole, weight_grad);
    }
  }

  void run_whole(Space& space, int64_t b, int64_t begin, int64_t count, float* weight_grad) {
    const int64_t at = b * tiles.shape.width * tiles.shape.length + begin, place = b * tiles.shape.length + begin;
    NormTile own = tile;
    own.count = count;
    own.stride = tiles.shape.length;
    kernels.norm_backward(own, c + at, grad + at, mean + place, rstd + place, c_grad + at, space.packed.data(),
                          weight_grad, weight_grad + tiles.shape.width);
  }

  // Positions beyond the end have the gradient 0, and add nothing.
  void run_edge(Space& space, int64_t b, int64_t begin, int64_t count, float* weight_grad) {
    const int64_t width = tiles.shape.width, stride = tiles.shape.length, at = b * width * stride + begin;
    float* of_c = space.edge.data();
    float* of_grad = of_c + width * kMostLanes;
    float* statistics = of_grad + width * kMostLanes;
    gather(c + at, stride, width, count, of_c);
    gather(grad + at, stride, width, count, of_grad);
    gather(mean + b * stride + begin, 0, 1, count, statistics);
    gather(rstd + b * stride + begin, 0, 1, count, statistics + kMostLanes);
    NormTile own = tile;
    own.count = own.stride = kMostLanes;
    kernels.norm_backward(own, of_c, of_grad, statistics, statistics + kMostLanes, of_c, space.packed.data(),
                          weight_grad, weight_grad + width);
    scatter(of_c, stride, width, count, c_grad + at);
  }
};

}  // namespace

void norm_silu_add(const Kernels& kernels, NormShape shape, const float* c, const float* x, const float* weight,
                   const float* bias, float epsilon, float* y, float* mean, float* rstd, int threads) {
  if (shape.batch * shape.width * shape.length == 0) return;
  const Tiles tiles(shape);
  const std::vector<Space> spaces(static_cast<size_t>(threads), Space(tiles, 1));
  Forward forward{kernels, tiles, {shape.width, 0, 0, weight, bias, epsilon}, c, x, y, mean, rstd, spaces};
  share_out(
      threads, shape.batch * tiles.pieces,
      [](int slot, int64_t item, void* context) { static_cast<Forward*>(context)->run(slot, item); }, &forward);
}

void norm_silu_add_gradient(const Kernels& kernels, NormShape shape, const float* c, const float* grad,
                            const float* weight, const float* bias, const float* mean, const float* rstd, float* c_grad,
                            float* weight_grad, float* bias_grad, int threads) {
  const size_t width = static_cast<size_t>(shape.width);
  std::fill_n(weight_grad, width, 0.0f);
  std::fill_n(bias_grad, width, 0.0f);
  if (shape.batch * shape.width * shape.length == 0) return;
  const Tiles tiles(shape);
  const int64_t items = shape.batch * tiles.pieces;
  const std::vector<Space> spaces(static_cast<size_t>(threads), Space(tiles, 2));
  Backward backward{kernels, tiles,  {shape.width, 0, 0, weight, bias, 0.0f},
                    c,       grad,   mean,
                    rstd,    c_grad, std::vector<float>(static_cast<size_t>(items) * 2 * width),
                    spaces};
  share_out(
      threads, items, [](int slot, int64_t item, void* context) { static_cast<Backward*>(context)->run(slot, item); },
      &backward);
  for (size_t d = 0; d < width; ++d) {
    double of_weight = 0, of_bias = 0;
    for (size_t item = 0; item < static_cast<size_t>(items); ++item) {
      of_weight += static_cast<double>(backward.sums[item * 2 * width + d]);
      of_bias += static_cast<double>(backward.sums[item * 2 * width + width + d]);
    }
    weight_grad[d] = static_cast<float>(of_weight);
    bias_grad[d] = static_cast<float>(of_bias);
  }
}

}  // namespace pareto
