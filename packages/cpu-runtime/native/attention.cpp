#include "attention.h"

#include <algorithm>
#include <atomic>

#include "ops.h"
#include "program.h"

namespace pareto {
namespace {

// Fewer pieces of work than this for each thread, and they are cut once more, along the cache.
constexpr int64_t kPiecesPerThread = 2;

// Rows of one slot that are attended together.
struct Rows {
  int64_t first, count;
};

class Attention final : public Step {
 public:
  Attention(AttentionStep parts, int threads)
      : p_(std::move(parts)),
        threads_(threads),
        dim_(p_.cache->head_dim()),
        kv_heads_(p_.cache->kv_heads()),
        group_(p_.heads / kv_heads_),
        chunks_((p_.cache->length() + kChunk - 1) / kChunk),
        ops_(*p_.ops) {
    q_norm_.norm = k_norm_.norm = Norm::rms;
    q_norm_.weight = p_.q_norm;
    k_norm_.weight = p_.k_norm;
    q_norm_.epsilon = k_norm_.epsilon = p_.norm_epsilon;
  }

  void place(Program& program) override {
    x_ = program.at(p_.x);
    y_ = program.at(p_.y);
    workspace_ = program.workspace();
    blocks_.reserve(static_cast<size_t>(program.max_rows()));
  }

  std::vector<int> buffers() const override { return {p_.x, p_.y}; }

  // Partial results of pieces that were cut along the cache.
  int64_t shared_bytes(int64_t rows) const override {
    const int64_t pieces = std::min(rows * kv_heads_, kPiecesPerThread * threads_);
    return threads_ == 1 ? 0 : pieces * chunks_ * partial_floats() * 4;
  }

  int64_t thread_bytes() const override {
    const int64_t queries = std::max(kBlockQueries, group_);
    return 4 * (attend_floats(queries, dim_) + queries * state_floats(dim_));
  }

  void run(Team& team, const Batch& batch) override {
    write(team, batch);
    if (team.thread() == 0) {
      cut(batch);
      next_.store(0, std::memory_order_relaxed);
    }
    team.barrier();
    const int64_t pieces = static_cast<int64_t>(blocks_.size()) * kv_heads_;
    if (blocks_of_one_row_ && pieces < kPiecesPerThread * threads_ && pieces % threads_ != 0)
      attend_by_chunks(team, batch, pieces);
    else
      attend_whole(team, batch, pieces);
  }

 private:
  int64_t row_floats() const { return (p_.heads + 2 * kv_heads_) * dim_; }
  int64_t partial_floats() const { return group_ * state_floats(dim_); }
  float* scratch(const Team& team) const {
    return reinterpret_cast<float*>(workspace_.threads + workspace_.per_thread * team.thread());
  }

  void turn(const Prologue& norm, int64_t position, float* head) const {
    if (norm.weight) ops_.normalise(norm, head, head, dim_);
    if (p_.rotary.cos_sin) ops_.rotate(p_.rotary, position, head);
  }

  // Norm, rotation, and the way of keys and values into the cache: rows are split over the threads.
  void write(Team& team, const Batch& batch) const {
    int64_t first, last;
    team.share(batch.rows, &first, &last);
    for (int64_t row = first; row < last; ++row)
      for (int64_t head = 0; head < p_.heads; ++head)
        turn(q_norm_, batch.positions[row], x_ + row * row_floats() + head * dim_);
    for (int64_t head = 0; head < kv_heads_; ++head)
      for (int64_t row = first; row < last; ++row) {
        const int64_t position = batch.positions[row];
        float* key = x_ + row * row_floats() + (p_.heads + head) * dim_;
        turn(k_norm_, position, key);
        ops_.append(p_.cache->type(), p_.cache->plane(p_.layer, batch.slots[row], head), dim_, position, key,
                    key + kv_heads_ * dim_);
      }
  }

  // Rows into blocks: large ones read the cache less often, but every thread should get some.
  void cut(const Batch& batch) {
    const int64_t most = std::min(kBlockQueries / group_, batch.rows * kv_heads_ / (4 * threads_));
    blocks_.clear();
    blocks_of_one_row_ = true;
    for (int64_t row = 0; row < batch.rows; ++row) {
      const bool goes_on = row > 0 && batch.slots[row] == batch.slots[row - 1] &&
                           batch.positions[row] == batch.positions[row - 1] + 1 && blocks_.back().count < most;
      if (goes_on) {
        ++blocks_.back().count;
        blocks_of_one_row_ = false;
      } else {
        blocks_.push_back({row, 1});
      }
    }
  }

  Queries queries(const Batch& batch, const Rows& rows, int64_t kv_head) const {
    Queries queries;
    queries.q = x_ + rows.first * row_floats() + kv_head * group_ * dim_;
    queries.row_stride = row_floats();
    queries.rows = rows.count;
    queries.first_position = batch.positions[rows.first];
    queries.group = group_;
    queries.head_dim = dim_;
    queries.scale = p_.scale;
    queries.slopes = p_.slopes ? p_.slopes + kv_head * group_ : nullptr;
    queries.window = p_.window;
    return queries;
  }

  // Piece i: heads one after the other, the last rows of a prompt, which see most, first.
  Queries piece(const Batch& batch, int64_t i, int64_t* kv_head, const Rows** rows) const {
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    *kv_head = i / blocks;
    *rows = &blocks_[static_cast<size_t>(blocks - 1 - i % blocks)];
    return queries(batch, **rows, *kv_head);
  }

  void store(const Queries& q, const Rows& rows, int64_t kv_head, const float* states) const {
    for (int64_t i = 0; i < q.count(); ++i)
      ops_.conclude(dim_, states + i * state_floats(dim_),
                    y_ + (rows.first + i / group_) * p_.heads * dim_ + (kv_head * group_ + i % group_) * dim_);
  }

  void attend_whole(Team& team, const Batch& batch, int64_t pieces) {
    float* states = scratch(team);
    float* space = states + std::max(kBlockQueries, group_) * state_floats(dim_);
    int64_t kv_head;
    const Rows* rows;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      const Queries q = piece(batch, i, &kv_head, &rows);
      const Plane plane = p_.cache->plane(p_.layer, batch.slots[rows->first], kv_head);
      ops_.attend(p_.cache->type(), plane, q, q.first_chunk(), q.last_chunk(), states, space);
      store(q, *rows, kv_head, states);
    }
  }

  // Every chunk of every piece apart, then the partials of each piece in order.
  void attend_by_chunks(Team& team, const Batch& batch, int64_t pieces) {
    float* partials = reinterpret_cast<float*>(workspace_.shared);
    int64_t kv_head;
    const Rows* rows;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces * chunks_;) {
      const int64_t chunk = i % chunks_;
      const Queries q = piece(batch, i / chunks_, &kv_head, &rows);
      if (chunk < q.first_chunk() || chunk >= q.last_chunk()) continue;
      const Plane plane = p_.cache->plane(p_.layer, batch.slots[rows->first], kv_head);
      ops_.attend(p_.cache->type(), plane, q, chunk, chunk + 1, partials + i * partial_floats(), scratch(team));
    }
    team.barrier();
    int64_t first, last;
    team.share(pieces, &first, &last);
    for (int64_t i = first; i < last; ++i) {
      const Queries q = piece(batch, i, &kv_head, &rows);
      float* states = partials + (i * chunks_ + q.first_chunk()) * partial_floats();
      for (int64_t chunk = q.first_chunk() + 1; chunk < q.last_chunk(); ++chunk)
        for (int64_t head = 0; head < group_; ++head)
          ops_.join(dim_, states + head * state_floats(dim_),
                    partials + (i * chunks_ + chunk) * partial_floats() + head * state_floats(dim_));
      store(q, *rows, kv_head, states);
    }
  }

  AttentionStep p_;
  int threads_;
  int64_t dim_, kv_heads_, group_, chunks_;
  const Ops& ops_;
  Prologue q_norm_, k_norm_;
  float* x_ = nullptr;
  float* y_ = nullptr;
  Workspace workspace_;
  // Written by the first thread before a barrier, read by all after it.
  std::vector<Rows> blocks_;
  bool blocks_of_one_row_ = true;
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace

std::unique_ptr<Step> attention_step(AttentionStep parts, int threads) {
  return std::make_unique<Attention>(std::move(parts), threads);
}

}  // namespace pareto
