// The next token of a row of logits.
#pragma once

#include <cstdint>
#include <vector>

namespace pareto {

// How one row is sampled, in transformers' order: temperature, then the top_k largest, then of these the fewest whose
// probabilities add up to top_p.
struct Sampling {
  float temperature = 0.0f;  // 0: the largest logit, the first of equals
  int64_t top_k = 0;         // 0: all; what equals the k-th largest stays too
  float top_p = 1.0f;        // 1: all
};

enum class Sampled : uint8_t { ok, nan, none };

// Choose by `random`, uniform in [0, 1). Sampled::nan where a logit is NaN or +infinity, Sampled::none where all are
// -infinity; `order` is room that calls share.
Sampled sample(const float* logits, int64_t vocabulary, const Sampling& how, float random, std::vector<int32_t>& order,
               int32_t* token);

}  // namespace pareto
