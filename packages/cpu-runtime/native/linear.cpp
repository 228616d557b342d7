#include "linear.h"

namespace pareto {
namespace {

// Up to here each thread prepares all rows for itself: dearer than its share, cheaper than waiting for the others.
constexpr int64_t kOwnRows = 2;

constexpr int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void prepare_row(const Kernel& kernel, const Packed& w, const Prologue& prologue, const float* x, int64_t row,
                 int64_t m, uint8_t* prepared, float* normed) {
  const float* source = x;
  if (prologue.norm != Norm::none) {
    normalise(prologue, x, normed, w.k);
    source = normed;
  }
  const int64_t tile = row / kTileRows, first = tile * kTileRows;
  const int64_t rows = m - first < kTileRows ? m - first : kTileRows;
  kernel.prepare(w, source, row - first, rows, prepared + first * kernel.row_bytes(w));
}

}  // namespace

int64_t shared_bytes(const Kernel& kernel, const Packed& w, int64_t m) {
  return m <= kOwnRows ? 0 : rounded(kernel.row_bytes(w) * m);
}

int64_t thread_bytes(const Kernel& kernel, const Packed& w) {
  return rounded(kernel.scratch_bytes(w)) + rounded(4 * w.k) + rounded(kernel.row_bytes(w) * kOwnRows);
}

void linear(Team& team, const Kernel& kernel, const Packed& w, const Prologue& prologue, const float* x,
            int64_t x_stride, int64_t m, const Epilogue& epilogue, const Workspace& workspace) {
  uint8_t* scratch = workspace.threads + workspace.per_thread * team.thread();
  float* normed = reinterpret_cast<float*>(scratch + rounded(kernel.scratch_bytes(w)));
  uint8_t* prepared = workspace.shared;
  if (m <= kOwnRows) {
    prepared = reinterpret_cast<uint8_t*>(normed) + rounded(4 * w.k);
    for (int64_t row = 0; row < m; ++row)
      prepare_row(kernel, w, prologue, x + row * x_stride, row, m, prepared, normed);
  } else {
    int64_t first, last;
    team.share(m, &first, &last);
    for (int64_t row = first; row < last; ++row)
      prepare_row(kernel, w, prologue, x + row * x_stride, row, m, prepared, normed);
    team.barrier();
  }
  int64_t first, last;
  team.share(w.panels(), &first, &last);
  kernel.multiply(w, prepared, m, first, last, epilogue, scratch);
}

}  // namespace pareto
