#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace pareto {
namespace {

// Candidates that are put in order at first; eight times as many each time that their probabilities do not reach top_p.
constexpr int64_t kFirstCandidates = 256;

struct Largest {
  int32_t token = -1;
  bool valid = true;
};

Largest largest(const float* logits, int64_t vocabulary) {
  Largest best;
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (!(logits[i] <= std::numeric_limits<float>::max())) best.valid = false;
    if (logits[i] > top) {
      top = logits[i];
      best.token = static_cast<int32_t>(i);
    }
  }
  return best;
}

// The weights of the `kept` tokens, exp((logit - largest) / temperature). The largest is taken off before the division,
// so that a temperature however small leaves it the weight 1.
void weigh(const float* logits, float top, double temperature, const std::vector<int32_t>& kept,
           std::vector<float>& weights) {
  const double inverse = std::min(1.0 / temperature, std::numeric_limits<double>::max());
  for (const int32_t i : kept) {
    const double below = static_cast<double>(logits[i]) - static_cast<double>(top);
    // A banned token's weight is 0 even where the temperature is so high that all others' are 1.
    weights[static_cast<size_t>(i)] = std::isinf(below) ? 0.0f : std::exp(static_cast<float>(below * inverse));
  }
}

// Leave in `kept` the top_k largest logits, and what equals the last of them.
void keep_top_k(const float* logits, int64_t top_k, std::vector<float>& values, std::vector<int32_t>& kept) {
  values.assign(logits, logits + kept.size());
  std::nth_element(values.begin(), values.begin() + top_k - 1, values.end(), std::greater<float>());
  const float kth = values[static_cast<size_t>(top_k) - 1];
  kept.erase(std::remove_if(kept.begin(), kept.end(), [&](int32_t i) { return logits[i] < kth; }), kept.end());
}

// Leave in `kept` the fewest tokens, largest first, whose weights reach top_p of the total.
void keep_top_p(const float* logits, double top_p, const std::vector<float>& weights, std::vector<int32_t>& kept) {
  const auto above = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a > b; };
  double total = 0.0, sum = 0.0;
  for (const int32_t i : kept) total += static_cast<double>(weights[static_cast<size_t>(i)]);
  size_t done = 0;
  for (size_t size = kFirstCandidates; done < kept.size(); size *= 8) {
    const size_t end = std::min(size, kept.size());
    const auto at = [&](size_t index) { return kept.begin() + static_cast<std::ptrdiff_t>(index); };
    std::partial_sort(at(done), at(end), kept.end(), above);
    for (; done < end; ++done) {
      sum += static_cast<double>(weights[static_cast<size_t>(kept[done])]);
      if (sum < top_p * total) continue;
      kept.resize(done + 1);
      return;
    }
  }
}

// The first of `kept` at which the weights, added up, exceed `random` of their total.
int32_t drawn(const std::vector<float>& weights, double random, const std::vector<int32_t>& kept) {
  double total = 0.0, sum = 0.0;
  for (const int32_t i : kept) total += static_cast<double>(weights[static_cast<size_t>(i)]);
  int32_t last = kept.front();
  for (const int32_t i : kept) {
    const double weight = static_cast<double>(weights[static_cast<size_t>(i)]);
    if (weight == 0.0) continue;
    sum += weight;
    last = i;
    if (sum > random * total) break;
  }
  return last;
}

}  // namespace

Sampled sample(const float* logits, int64_t vocabulary, const Sampling& how, double random, SamplingRoom& room,
               int32_t* token) {
  const Largest best = largest(logits, vocabulary);
  if (!best.valid) return Sampled::nan;
  if (best.token < 0) return Sampled::none;
  *token = best.token;
  if (how.temperature == 0.0 || how.top_k == 1) return Sampled::ok;
  room.kept.resize(static_cast<size_t>(vocabulary));
  std::iota(room.kept.begin(), room.kept.end(), 0);
  if (how.top_k > 0 && how.top_k < vocabulary) keep_top_k(logits, how.top_k, room.weights, room.kept);
  room.weights.resize(static_cast<size_t>(vocabulary));
  weigh(logits, logits[best.token], how.temperature, room.kept, room.weights);
  if (how.top_p < 1.0) {
    keep_top_p(logits, how.top_p, room.weights, room.kept);
    std::sort(room.kept.begin(), room.kept.end());
  }
  const auto unlikely = [&](int32_t i) { return room.weights[static_cast<size_t>(i)] < how.min_p; };
  if (how.min_p > 0.0) room.kept.erase(std::remove_if(room.kept.begin(), room.kept.end(), unlikely), room.kept.end());
  *token = drawn(room.weights, random, room.kept);
  return Sampled::ok;
}

}  // namespace pareto
