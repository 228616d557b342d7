// Attention over the cache: what is done to rows, and the parts of it that are compiled per instruction set (ops.h).
//
// The positions that a row may see are cut into chunks of 128, counted from position 0. Each chunk gives a row a
// partial result: the largest score, the sum of exp(score - largest), and the values weighted by those. Partials are
// joined in ascending order. That a chunk's work is the same whether its row came alone or in a prompt, and whoever
// does it, makes a row's result bitwise the same however rows and threads are arranged.
#pragma once

#include <memory>

#include "cache.h"
#include "linear.h"

namespace pareto {

class Step;
struct Ops;

// Norm and rotation of the head vectors of queries and keys.
struct Rotary {
  const float* cos_sin = nullptr;  // (length, dim): dim / 2 cosines, then dim / 2 sines; null for no rotation
  int64_t dim = 0;                 // the first `dim` values of a head vector are rotated
  bool interleaved = false;        // pairs (2i, 2i + 1) as in GPT-J, not (i, i + dim / 2)
};

// Rows of one slot, at positions that go up, with the query heads that share one key-value head.
struct Queries {
  const float* q = nullptr;  // first row's first head, rotated
  int64_t row_stride = 0;    // floats from a row to the next; heads lie beside each other
  int64_t rows = 0;
  int64_t first_position = 0;  // row i stands at first_position + i
  int64_t group = 1;           // query heads per key-value head
  int64_t head_dim = 0;
  float scale = 1.0f;
  const float* slopes = nullptr;  // (group) score += slope * (key position - query position)
  int64_t window = 0;             // keys seen, the row's own included; 0: all

  int64_t count() const { return rows * group; }
  int64_t first_key() const { return window && first_position >= window ? first_position - window + 1 : 0; }
  int64_t first_chunk() const { return first_key() / kChunk; }
  int64_t last_chunk() const { return (first_position + rows - 1) / kChunk + 1; }
};

// A partial result of one row and head: largest score, sum, and from kStateHead on the weighted values (value_width).
// A sum of 0 says that there is none yet.
constexpr int64_t kStateHead = 16;
constexpr int64_t state_floats(int64_t head_dim) { return kStateHead + value_width(head_dim); }

// Rows times heads that one piece of work takes at most, unless one row has more heads.
constexpr int64_t kBlockQueries = 96;

// Floats that `attend` needs for up to `count` rows times heads.
constexpr int64_t attend_floats(int64_t count, int64_t head_dim) {
  return kChunk * (head_dim + value_width(head_dim)) + 6 * (kChunk + kChunk / 2 + state_floats(head_dim)) +
         value_width(head_dim) + count * head_dim + 64;
}

struct AttentionStep {
  const Ops* ops = nullptr;
  std::shared_ptr<Cache> cache;
  int64_t layer = 0;
  int x = -1, y = -1;
  int64_t heads = 0;
  float scale = 1.0f;
  Rotary rotary;
  const float* slopes = nullptr;  // (heads)
  int64_t window = 0;
  const float* q_norm = nullptr;  // (head_dim) RMS norm of each head before the rotation
  const float* k_norm = nullptr;
  float norm_epsilon = 0.0f;
};

// x holds rows of queries, keys and values; y gets rows of heads * head_dim.
std::unique_ptr<Step> attention_step(AttentionStep parts, int threads);

}  // namespace pareto
