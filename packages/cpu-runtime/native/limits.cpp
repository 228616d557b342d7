#include "limits.h"

#include <cstring>

#include "isa.h"

namespace pareto {
namespace {

int64_t read_words(const uint8_t* data, int64_t bytes) {
  int64_t sums[8] = {};
  for (int64_t at = 0; at + 64 <= bytes; at += 64)
    for (int i = 0; i < 8; ++i) {
      int64_t word;
      std::memcpy(&word, data + at + 8 * i, 8);
      sums[i] ^= word;
    }
  int64_t all = 0;
  for (int64_t sum : sums) all ^= sum;
  return all;
}

constexpr Limits kAnyLimits = {read_words, nullptr, 0};

}  // namespace

extern const Limits kAvx512VnniLimits;

const Limits& limits() { return available(Isa::avx512_vnni) ? kAvx512VnniLimits : kAnyLimits; }

}  // namespace pareto
