// The next token of a row of logits.
#pragma once

#include <cstdint>
#include <vector>

namespace pareto {

// How one row is sampled, in transformers' order: temperature, then the top_k largest, then of these the fewest whose
// probabilities add up to top_p, then those with at least min_p of the largest probability.
struct Sampling {
  double temperature = 0.0;  // 0: the largest logit, the first of equals
  int64_t top_k = 0;         // 0: all, 1: the largest alone; else what equals the k-th largest stays too
  double top_p = 1.0;        // 1: all; of equals, those further back in the vocabulary stay
  double min_p = 0.0;        // 0: all
};

enum class Sampled : uint8_t { ok, nan, none };

// Room that calls share: the tokens that are left, and their weights, by token.
struct SamplingRoom {
  std::vector<int32_t> kept;
  std::vector<float> weights;
};

// Choose by `random`, uniform in [0, 1): the first token, in the order of the vocabulary, at which the probabilities of
// those left, added up, exceed it. Sampled::nan where a logit is NaN or +infinity, Sampled::none where all are
// -infinity.
Sampled sample(const float* logits, int64_t vocabulary, const Sampling& how, double random, SamplingRoom& room,
               int32_t* token);

}  // namespace pareto
