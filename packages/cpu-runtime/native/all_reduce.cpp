#include "all_reduce.h"

#include <chrono>
#include <cstring>
#include <thread>

namespace pareto {
namespace {

constexpr int64_t kLine = 64;
// Turns of the waiting loop between two looks at the clock.
constexpr int kSpins = 512;

static_assert(std::atomic<int64_t>::is_always_lock_free, "counters in shared memory must not need locks");

constexpr int64_t rounded(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

class AllReduce final : public Step {
 public:
  AllReduce(std::shared_ptr<Exchange> exchange, int x, int residual, int y)
      : exchange_(std::move(exchange)), from_(x), residual_(residual), to_(y) {}

  void place(Program& program) override {
    x_ = program.at(from_);
    r_ = program.at(residual_);
    y_ = program.at(to_);
    width_ = program.width(to_);
  }

  std::vector<int> buffers() const override { return {from_, residual_, to_}; }

  void run(Team& team, const Batch& batch) override {
    int64_t first, last;
    team.share(batch.rows * width_, &first, &last);
    if (last > first) std::memcpy(exchange_->mine() + first, x_ + first, static_cast<size_t>(last - first) * 4);
    team.barrier();
    if (team.thread() == 0) exchange_->meet();
    team.barrier();
    if (exchange_->stopped()) return;
    for (int64_t i = first; i < last; ++i) {
      float sum = exchange_->place(0)[i];
      for (int rank = 1; rank < exchange_->ranks(); ++rank) sum += exchange_->place(rank)[i];
      y_[i] = r_[i] + sum;
    }
    team.barrier();
    if (team.thread() == 0) exchange_->turn();
  }

 private:
  std::shared_ptr<Exchange> exchange_;
  int from_, residual_, to_;
  const float* x_ = nullptr;
  const float* r_ = nullptr;
  float* y_ = nullptr;
  int64_t width_ = 0;
};

}  // namespace

Exchange::Exchange(uint8_t* memory, int ranks, int rank, int64_t floats, double timeout_s)
    : memory_(memory), ranks_(ranks), rank_(rank), floats_(floats), timeout_s_(timeout_s) {}

// A line for the flag, a line for each rank's counter, and two sets of places.
int64_t Exchange::bytes(int64_t ranks, int64_t floats) { return (1 + ranks) * kLine + 2 * ranks * rounded(floats * 4); }

std::atomic<int64_t>& Exchange::arrived(int rank) const {
  return *reinterpret_cast<std::atomic<int64_t>*>(memory_ + (1 + rank) * kLine);
}

float* Exchange::place(int rank) const {
  const int64_t places = (turn_ % 2) * ranks_ + rank;
  return reinterpret_cast<float*>(memory_ + (1 + ranks_) * kLine + places * rounded(floats_ * 4));
}

void Exchange::meet() {
  arrived(rank_).store(turn_ + 1, std::memory_order_release);
  const auto start = std::chrono::steady_clock::now();
  for (int rank = 0; rank < ranks_; ++rank) {
    for (int spins = 0; arrived(rank).load(std::memory_order_acquire) <= turn_; ++spins) {
      if (spins < kSpins) {
        __builtin_ia32_pause();
        continue;
      }
      spins = 0;
      if (stopped()) return;
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (waited.count() > timeout_s_) {
        stop();
        return;
      }
      std::this_thread::yield();
    }
  }
}

void Exchange::stop() { reinterpret_cast<std::atomic<int64_t>*>(memory_)->store(1, std::memory_order_release); }

bool Exchange::stopped() const {
  return reinterpret_cast<std::atomic<int64_t>*>(memory_)->load(std::memory_order_acquire) != 0;
}

std::unique_ptr<Step> all_reduce_step(std::shared_ptr<Exchange> exchange, int x, int residual, int y) {
  return std::make_unique<AllReduce>(std::move(exchange), x, residual, y);
}

}  // namespace pareto
