// A decoder as a list of steps over numbered buffers, run by a team of threads in one burst per call.
//
// Python builds the list once, step by step (src/pareto_cpu_runtime/families); buffers get their places in one block of
// memory before the first call, so that a call allocates nothing. Rows are tokens: those of one prompt, or one token
// each of several requests, or both; each row says whose it is (slot) and where it stands (position).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "linear.h"
#include "memory.h"

namespace pareto {

// The rows of one call, and where the logits of some of them go.
struct Batch {
  int64_t rows = 0;
  const int32_t* tokens = nullptr;     // (rows)
  const int32_t* slots = nullptr;      // (rows) whose cache a row reads and extends
  const int32_t* positions = nullptr;  // (rows) tokens before it in its slot
  int64_t wanted = 0;
  const int32_t* want = nullptr;  // (wanted) rows whose logits are asked for
  float* logits = nullptr;        // (wanted, vocabulary)
};

class Program;

class Step {
 public:
  virtual ~Step() = default;
  // Called by every thread of the team; the program sees to a barrier after each step.
  virtual void run(Team& team, const Batch& batch) = 0;
  // Told once all steps are known and buffers have their places.
  virtual void place(Program&) {}
  // Buffers that are read or written: what is kept apart in memory while it lives.
  virtual std::vector<int> buffers() const { return {}; }
  // Memory shared by the team during this step, and of each thread.
  virtual int64_t shared_bytes(int64_t /*rows*/) const { return 0; }
  virtual int64_t thread_bytes() const { return 0; }
};

class Program {
 public:
  Program(std::shared_ptr<Pool> pool, int64_t max_rows) : pool_(std::move(pool)), max_rows_(max_rows) {}

  // A new buffer of max_rows x width fp32; returns its number.
  int buffer(int64_t width);
  void add(std::unique_ptr<Step> step) { steps_.push_back(std::move(step)); }
  // Plan memory; no step can be added afterwards.
  void finish();
  void run(const Batch& batch);

  float* at(int buffer) const {
    return reinterpret_cast<float*>(arena_->data() + offsets_[static_cast<size_t>(buffer)]);
  }
  int64_t width(int buffer) const { return widths_.at(static_cast<size_t>(buffer)); }
  int64_t max_rows() const { return max_rows_; }
  bool finished() const { return arena_ != nullptr; }
  // Bytes of all buffers and workspaces.
  int64_t planned_bytes() const { return arena_ ? arena_->bytes() : 0; }
  const Workspace& workspace() const { return workspace_; }
  Pool& pool() const { return *pool_; }

 private:
  std::shared_ptr<Pool> pool_;
  int64_t max_rows_;
  std::vector<int64_t> widths_, offsets_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::unique_ptr<Block> arena_;
  Workspace workspace_;
};

// x[row] = table[token] * scale; the table is (vocabulary, width), bf16 or fp32.
std::unique_ptr<Step> embed_step(const void* table, bool bf16, int64_t vocabulary, int64_t width, float scale, int x);

struct LinearStep {
  const Kernel* kernel;
  Packed weight;
  Prologue prologue;
  std::vector<float> bias;  // (panels * 64) or empty
  Activation activation = Activation::none;
  bool gated = false;
  int x = -1, y = -1, residual = -1;
  bool logits = false;  // y is the batch's logits, and only the wanted rows are multiplied
};
std::unique_ptr<Step> linear_step(LinearStep parts);

}  // namespace pareto
