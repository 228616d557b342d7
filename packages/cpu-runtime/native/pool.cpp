#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <mutex>

namespace pareto {
namespace {

constexpr int64_t kSpinNanoseconds = 50'000;
// Pauses after which a waiting thread lets others run: their share of the work may be queued behind this very thread.
constexpr int kPausesPerYield = 1 << 14;

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

void futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, nullptr, nullptr, 0);
}

void bind(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // refused: the thread runs where it may
}

}  // namespace

struct alignas(64) Pool::State {
  std::mutex callers;
  alignas(64) std::atomic<uint32_t> burst{0};  // its number: workers wait for the next
  alignas(64) std::atomic<int> sleepers{0};
  alignas(64) std::atomic<int> working{0};
  alignas(64) std::atomic<int64_t> arrived{0};
  void (*work)(Team&, void*) = nullptr;
  void* context = nullptr;
  bool ends = false;

  // Wait for a burst after number `seen`; returns its number.
  uint32_t next(uint32_t seen) {
    const int64_t until = now() + kSpinNanoseconds;
    for (;;) {
      for (int i = 0; i < 64; ++i) {
        const uint32_t number = burst.load(std::memory_order_acquire);
        if (number != seen) return number;
        _mm_pause();
      }
      if (now() > until) break;
    }
    for (;;) {
      sleepers.fetch_add(1);
      uint32_t number = burst.load();
      if (number == seen) futex(burst, FUTEX_WAIT_PRIVATE, seen);
      sleepers.fetch_sub(1);
      number = burst.load(std::memory_order_acquire);
      if (number != seen) return number;
    }
  }
};

void Team::barrier() {
  if (threads_ == 1) return;
  passed_ += threads_;
  arrived_.fetch_add(1, std::memory_order_acq_rel);
  for (int pauses = 1; arrived_.load(std::memory_order_acquire) < passed_; ++pauses) {
    _mm_pause();
    if (pauses % kPausesPerYield == 0) sched_yield();
  }
}

Pool::Pool(int threads, std::vector<int> cpus) : state_(new State) {
  for (int i = 1; i < threads; ++i) {
    const int cpu = i < static_cast<int>(cpus.size()) ? cpus[static_cast<size_t>(i)] : -1;
    workers_.emplace_back([state = state_.get(), i, threads, cpu] {
      if (cpu >= 0) bind(cpu);
      uint32_t seen = 0;
      for (;;) {
        seen = state->next(seen);
        if (state->ends) return;
        int64_t passed = 0;
        Team team(i, threads, state->arrived, passed);
        state->work(team, state->context);
        state->working.fetch_sub(1, std::memory_order_release);
      }
    });
  }
}

Pool::~Pool() {
  state_->ends = true;
  state_->burst.fetch_add(1);
  futex(state_->burst, FUTEX_WAKE_PRIVATE, 1 << 30);
  for (auto& worker : workers_) worker.join();
}

void Pool::run(void (*work)(Team&, void*), void* context) {
  const std::lock_guard<std::mutex> one(state_->callers);
  State& s = *state_;
  s.work = work;
  s.context = context;
  s.arrived.store(0, std::memory_order_relaxed);
  s.working.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  s.burst.fetch_add(1);
  if (s.sleepers.load() > 0) futex(s.burst, FUTEX_WAKE_PRIVATE, 1 << 30);
  int64_t passed = 0;
  Team team(0, threads(), s.arrived, passed);
  work(team, context);
  for (int pauses = 1; s.working.load(std::memory_order_acquire) > 0; ++pauses) {
    _mm_pause();
    if (pauses % kPausesPerYield == 0) sched_yield();
  }
}

}  // namespace pareto
