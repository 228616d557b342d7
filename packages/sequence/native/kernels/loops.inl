// The inner loops for vectors of kLanes floats; kAccs of them are summed into at once, and kDots inner products taken.
//
// The including file defines the three constants in an unnamed namespace. Only plain loops here, nothing of the
// standard library: a function shared with other files would be compiled for this file's instruction set alone.
#include "../kernels.h"

namespace pareto {
namespace {

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float LooseFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Floats load(const float* at) { return *reinterpret_cast<const LooseFloats*>(at); }
inline void store(float* at, Floats x) { *reinterpret_cast<LooseFloats*>(at) = x; }
inline Floats all(float x) { return x - Floats{}; }

// Positions that one pass over the taps covers.
constexpr int64_t kPart = kLanes * kAccs;
static_assert(kBlock % kPart == 0 && kLanes <= kMostLanes);

// The weights of up to this many taps are kept apart for the whole run; the loop over the taps is unrolled.
constexpr int kUnrolledTaps = 16;

template <int taps>
void run_taps(float* __restrict y, const float* const* source, const float* __restrict weight, float bias,
              int64_t blocks) {
  Floats weights[taps];
  for (int k = 0; k < taps; ++k) weights[k] = all(weight[k]);
  for (int64_t at = 0; at < blocks * kBlock; at += kPart) {
    Floats sums[kAccs];
#pragma GCC unroll 16
    for (int i = 0; i < kAccs; ++i) sums[i] = all(bias);
#pragma GCC unroll 16
    for (int k = 0; k < taps; ++k) {
      const float* from = source[k] + at;
#pragma GCC unroll 16
      for (int i = 0; i < kAccs; ++i) sums[i] += weights[k] * load(from + i * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kAccs; ++i) store(y + at + i * kLanes, sums[i]);
  }
}

void run_many(float* __restrict y, const float* const* source, const float* __restrict weight, int64_t taps, float bias,
              int64_t blocks) {
  for (int64_t at = 0; at < blocks * kBlock; at += kPart) {
    Floats sums[kAccs];
#pragma GCC unroll 16
    for (int i = 0; i < kAccs; ++i) sums[i] = all(bias);
    for (int64_t k = 0; k < taps; ++k) {
      const float* from = source[k] + at;
      const Floats w = all(weight[k]);
#pragma GCC unroll 16
      for (int i = 0; i < kAccs; ++i) sums[i] += w * load(from + i * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kAccs; ++i) store(y + at + i * kLanes, sums[i]);
  }
}

template <int taps>
void run_exactly(int64_t wanted, float* y, const float* const* source, const float* weight, float bias,
                 int64_t blocks) {
  if constexpr (taps > 1) {
    if (wanted < taps) return run_exactly<taps - 1>(wanted, y, source, weight, bias, blocks);
  }
  run_taps<taps>(y, source, weight, bias, blocks);
}

void run(float* y, const float* const* source, const float* weight, int64_t taps, float bias, int64_t blocks) {
  if (taps > kUnrolledTaps) return run_many(y, source, weight, taps, bias, blocks);
  run_exactly<kUnrolledTaps>(taps, y, source, weight, bias, blocks);
}

// Vectors of `grad` that are held while the taps are gone through.
constexpr int kHeld = 4;
static_assert(kBlock % (kLanes * kHeld) == 0);

template <int taps>
void dot_taps(const float* __restrict grad, const float* const* source, int64_t at, int64_t blocks,
              float* __restrict sums) {
  // Few taps: several sums for each, since an addition waits for the one before it.
  constexpr int chains = taps * 4 <= kDots ? 4 : taps * 2 <= kDots ? 2 : 1;
  Floats partial[taps][chains];
#pragma GCC unroll 16
  for (int k = 0; k < taps; ++k) {
    partial[k][0] = load(sums + k * kLanes);
#pragma GCC unroll 16
    for (int c = 1; c < chains; ++c) partial[k][c] = Floats{};
  }
  for (int64_t t = 0; t < blocks * kBlock; t += kLanes * kHeld) {
    Floats held[kHeld];
#pragma GCC unroll 16
    for (int i = 0; i < kHeld; ++i) held[i] = load(grad + t + i * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < taps; ++k) {
      const float* from = source[k] + at + t;
#pragma GCC unroll 16
      for (int i = 0; i < kHeld; ++i) partial[k][i % chains] += held[i] * load(from + i * kLanes);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < taps; ++k) {
#pragma GCC unroll 16
    for (int c = 1; c < chains; ++c) partial[k][0] += partial[k][c];
    store(sums + k * kLanes, partial[k][0]);
  }
}

template <int taps>
void dot_exactly(int64_t wanted, const float* grad, const float* const* source, int64_t at, int64_t blocks,
                 float* sums) {
  if constexpr (taps > 1) {
    if (wanted < taps) return dot_exactly<taps - 1>(wanted, grad, source, at, blocks, sums);
  }
  dot_taps<taps>(grad, source, at, blocks, sums);
}

void dots(const float* grad, const float* const* source, int64_t at, int64_t taps, int64_t blocks, float* sums) {
  const int64_t passes = (taps + kDots - 1) / kDots;
  for (int64_t pass = 0; pass < passes; ++pass) {
    // Shares of equal size: 11 taps in passes of at most 8 are 5 and 6.
    const int64_t first = taps * pass / passes, last = taps * (pass + 1) / passes;
    dot_exactly<kDots>(last - first, grad, source + first, at, blocks, sums + first * kLanes);
  }
}

constexpr int64_t kSummedInSingle = 4096;

double sum(const float* values, int64_t count) {
  double total = 0;
  int64_t at = 0;
  while (count - at >= kLanes) {
    const int64_t left = count - at;
    const int64_t vectors = (left < kSummedInSingle ? left : kSummedInSingle) / kLanes;
    Floats even{}, odd{};
    for (int64_t i = 0; i + 1 < vectors; i += 2) {
      even += load(values + at + i * kLanes);
      odd += load(values + at + (i + 1) * kLanes);
    }
    if (vectors % 2) even += load(values + at + (vectors - 1) * kLanes);
    for (int i = 0; i < kLanes; ++i) total += static_cast<double>(even[i]) + static_cast<double>(odd[i]);
    at += vectors * kLanes;
  }
  for (; at < count; ++at) total += static_cast<double>(values[at]);
  return total;
}

}  // namespace
}  // namespace pareto
