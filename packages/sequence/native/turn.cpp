#include "turn.h"

#include <algorithm>

#include "pool.h"

namespace pareto {
namespace {

// Side of a block: its rows are whole cache lines on either side, read once and written once. Where rows are a power of
// two apart, lines that are not finished at once would push each other out of the cache.
constexpr int64_t kSide = 32;

struct Turn {
  TurnShape shape;
  int64_t bands;  // of kSide columns
  const float* from;
  float* to;

  void run(int64_t item) const {
    const int64_t b = item / bands, first = item % bands * kSide, size = shape.rows * shape.columns;
    const int64_t width = std::min(kSide, shape.columns - first);
    for (int64_t row = 0; row < shape.rows; row += kSide) {
      const int64_t height = std::min(kSide, shape.rows - row);
      const float* in = from + b * size + row * shape.columns + first;
      float* out = to + b * size + first * shape.rows + row;
      if (width == kSide && height == kSide)
        block(in, out, kSide, kSide);
      else
        block(in, out, height, width);
    }
  }

  // Inlined with constant sizes for whole blocks.
  inline __attribute__((always_inline)) void block(const float* in, float* out, int64_t height, int64_t width) const {
    float copy[kSide][kSide + 1];  // one more: its columns do not share a few sets either
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) copy[i][j] = in[i * shape.columns + j];
    for (int64_t j = 0; j < width; ++j)
      for (int64_t i = 0; i < height; ++i) out[j * shape.rows + i] = copy[i][j];
  }
};

}  // namespace

void turn(TurnShape shape, const float* from, float* to, int threads) {
  Turn work{shape, (shape.columns + kSide - 1) / kSide, from, to};
  share_out(
      threads, shape.batch * work.bands,
      [](int, int64_t item, void* context) { static_cast<const Turn*>(context)->run(item); }, &work);
}

}  // namespace pareto
