#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

// The first of `order` at which the probabilities, added up, exceed `random` of their total.
template <typename Weight>
int32_t drawn(const std::vector<int32_t>& order, double total, float random, Weight weight) {
  const double mark = static_cast<double>(random) * total;
  double sum = 0.0;
  int32_t last = order.front();
  for (const int32_t token : order) {
    const double w = weight(token);
    if (w == 0.0) continue;
    sum += w;
    last = token;
    if (sum > mark) break;
  }
  return last;
}

// Leave in `order` the fewest tokens, largest first, whose weights reach top_p of the total.
template <typename Above, typename Weight>
double keep_top_p(std::vector<int32_t>& order, double top_p, double total, Above above, Weight weight) {
  double sum = 0.0;
  size_t done = 0;
  for (size_t size = kFirstCandidates;; size *= 8) {
    const size_t end = std::min(size, order.size());
    std::partial_sort(order.begin() + static_cast<std::ptrdiff_t>(done), order.begin() + static_cast<std::ptrdiff_t>(end),
                      order.end(), above);
    for (; done < end; ++done) {
      sum += weight(order[done]);
      if (sum >= top_p * total) {
        order.resize(done + 1);
        return sum;
      }
    }
    if (end == order.size()) return sum;
  }
}

}  // namespace

Sampled sample(const float* logits, int64_t vocabulary, const Sampling& how, float random, std::vector<int32_t>& order,
               int32_t* token) {
  const Largest best = largest(logits, vocabulary);
  if (!best.valid) return Sampled::nan;
  if (best.token < 0) return Sampled::none;
  *token = best.token;
  if (how.temperature == 0.0f || how.top_k == 1) return Sampled::ok;
  const double top = logits[best.token], inverse = 1.0 / static_cast<double>(how.temperature);
  const auto weight = [&](int32_t i) { return std::exp((logits[i] - top) * inverse); };
  const auto above = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  order.resize(static_cast<size_t>(vocabulary));
  for (int64_t i = 0; i < vocabulary; ++i) order[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  if (how.top_k > 0 && how.top_k < vocabulary) {
    std::nth_element(order.begin(), order.begin() + how.top_k - 1, order.end(), above);
    const float kth = logits[order[static_cast<size_t>(how.top_k) - 1]];
    const auto end = std::partition(order.begin() + how.top_k, order.end(), [&](int32_t i) { return logits[i] == kth; });
    order.erase(end, order.end());
    std::sort(order.begin(), order.end(), above);
  }
  double total = 0.0;
  for (const int32_t i : order) total += weight(i);
  if (how.top_p < 1.0f) total = keep_top_p(order, static_cast<double>(how.top_p), total, above, weight);
  *token = drawn(order, total, random, weight);
  return Sampled::ok;
}

}  // namespace pareto
