#include "program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace pareto {
namespace {

constexpr int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

class Embed final : public Step {
 public:
  Embed(const void* table, bool bf16, int64_t width, float scale, int x)
      : table_(table), bf16_(bf16), width_(width), scale_(scale), x_(x) {}

  void place(Program& program) override { out_ = program.at(x_); }
  std::vector<int> buffers() const override { return {x_}; }

  void run(Team& team, const Batch& batch) override {
    int64_t first, last;
    team.share(batch.rows, &first, &last);
    for (int64_t row = first; row < last; ++row) {
      float* out = out_ + row * width_;
      const int64_t at = static_cast<int64_t>(batch.tokens[row]) * width_;
      if (bf16_) {
        const uint16_t* source = static_cast<const uint16_t*>(table_) + at;
        for (int64_t i = 0; i < width_; ++i) {
          const uint32_t bits = static_cast<uint32_t>(source[i]) << 16;
          float value;
          std::memcpy(&value, &bits, 4);
          out[i] = value * scale_;
        }
      } else {
        const float* source = static_cast<const float*>(table_) + at;
        for (int64_t i = 0; i < width_; ++i) out[i] = source[i] * scale_;
      }
    }
  }

 private:
  const void* table_;
  bool bf16_;
  int64_t width_;
  float scale_;
  int x_;
  float* out_ = nullptr;
};

class Linear final : public Step {
 public:
  explicit Linear(LinearStep parts) : p_(std::move(parts)) {}

  void place(Program& program) override {
    x_ = program.at(p_.x);
    x_stride_ = program.width(p_.x);
    workspace_ = program.workspace();
    Epilogue& e = epilogue_;
    e.bias = p_.bias.empty() ? nullptr : p_.bias.data();
    e.activation = p_.activation;
    e.gated = p_.gated;
    if (p_.residual >= 0) {
      e.residual = program.at(p_.residual);
      e.residual_stride = program.width(p_.residual);
    }
    if (p_.logits) {
      e.stride = p_.gated ? p_.weight.n / 2 : p_.weight.n;
    } else {
      e.y = program.at(p_.y);
      e.stride = program.width(p_.y);
    }
  }

  std::vector<int> buffers() const override {
    std::vector<int> used = {p_.x};
    if (p_.y >= 0) used.push_back(p_.y);
    if (p_.residual >= 0) used.push_back(p_.residual);
    return used;
  }

  int64_t shared_bytes(int64_t rows) const override { return pareto::shared_bytes(*p_.kernel, p_.weight, rows); }
  int64_t thread_bytes() const override { return pareto::thread_bytes(*p_.kernel, p_.weight); }

  void run(Team& team, const Batch& batch) override {
    if (!p_.logits) {
      linear(team, *p_.kernel, p_.weight, p_.prologue, x_, x_stride_, batch.rows, epilogue_, workspace_);
      return;
    }
    // The wanted rows move together; each comes from its place or from further on, so ascending order loses none.
    if (batch.wanted == 0) return;
    if (team.thread() == 0)
      for (int64_t i = 0; i < batch.wanted; ++i)
        if (batch.want[i] != i)
          std::memmove(x_ + i * x_stride_, x_ + batch.want[i] * x_stride_, static_cast<size_t>(x_stride_) * 4);
    team.barrier();
    Epilogue e = epilogue_;
    e.y = batch.logits;
    linear(team, *p_.kernel, p_.weight, p_.prologue, x_, x_stride_, batch.wanted, e, workspace_);
  }

 private:
  LinearStep p_;
  float* x_ = nullptr;
  int64_t x_stride_ = 0;
  Workspace workspace_;
  Epilogue epilogue_;
};

// The steps between which a buffer must keep its memory.
struct Life {
  int first = -1, last = -1;
};

}  // namespace

std::unique_ptr<Step> embed_step(const void* table, bool bf16, int64_t /*vocabulary*/, int64_t width, float scale,
                                 int x) {
  return std::make_unique<Embed>(table, bf16, width, scale, x);
}

std::unique_ptr<Step> linear_step(LinearStep parts) { return std::make_unique<Linear>(std::move(parts)); }

int Program::buffer(int64_t width) {
  widths_.push_back(width);
  return static_cast<int>(widths_.size()) - 1;
}

void Program::finish() {
  if (finished()) throw std::logic_error("the program is finished already");
  std::vector<Life> lives(widths_.size());
  int64_t shared = 0, per_thread = 0;
  for (int number = 0; number < static_cast<int>(steps_.size()); ++number) {
    const Step& step = *steps_[static_cast<size_t>(number)];
    for (int buffer : step.buffers()) {
      Life& life = lives.at(static_cast<size_t>(buffer));
      if (life.first < 0) life.first = number;
      life.last = number;
    }
    // Fewer rows may need more than none: kernels prepare small counts apart.
    shared = std::max({shared, step.shared_bytes(max_rows_), step.shared_bytes(1)});
    per_thread = std::max(per_thread, step.thread_bytes());
  }
  // Largest first, each at the lowest place where nothing that lives at the same time lies.
  std::vector<size_t> order(widths_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return widths_[a] > widths_[b]; });
  offsets_.assign(widths_.size(), 0);
  int64_t total = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const size_t mine = order[i];
    const int64_t bytes = rounded(widths_[mine] * max_rows_ * 4);
    int64_t offset = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t j = 0; j < i; ++j) {
        const size_t other = order[j];
        const int64_t end = offsets_[other] + rounded(widths_[other] * max_rows_ * 4);
        const bool together = lives[mine].first <= lives[other].last && lives[other].first <= lives[mine].last;
        if (together && offset < end && offsets_[other] < offset + bytes) {
          offset = end;
          moved = true;
        }
      }
    }
    offsets_[mine] = offset;
    total = std::max(total, offset + bytes);
  }
  shared = rounded(shared);
  // A line between threads' shares, so that none writes where another reads.
  per_thread = rounded(per_thread) + 64;
  arena_ = std::make_unique<Block>(total + shared + per_thread * pool_->threads() + 64);
  workspace_ = {arena_->data() + total, arena_->data() + total + shared, per_thread};
  for (auto& step : steps_) step->place(*this);
}

void Program::run(const Batch& batch) {
  struct Job {
    Program* program;
    const Batch* batch;
  } job = {this, &batch};
  pool_->run(
      [](Team& team, void* context) {
        const Job& j = *static_cast<Job*>(context);
        for (auto& step : j.program->steps_) {
          step->run(team, *j.batch);
          team.barrier();
        }
      },
      &job);
}

}  // namespace pareto
