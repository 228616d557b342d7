// A thread pool for work that comes in bursts of many short steps: one wake-up per token, spin barriers within.
//
// No OpenMP: two copies of its runtime in one process slow each other down, and torch brings one. Between bursts the
// workers spin for at most 50 us and then sleep, so that torch's own threads find the cores free.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace pareto {

// The threads that work on one burst, as each of them sees it.
class Team {
 public:
  Team(int thread, int threads, std::atomic<int64_t>& arrived, int64_t& passed)
      : thread_(thread), threads_(threads), arrived_(arrived), passed_(passed) {}

  int thread() const { return thread_; }
  int threads() const { return threads_; }

  // Wait until every thread of the team has come here; what they wrote before is seen after.
  void barrier();

  // This thread's share [first, last) of `count` items: contiguous, sizes equal but for one.
  void share(int64_t count, int64_t* first, int64_t* last) const {
    *first = count * thread_ / threads_;
    *last = count * (thread_ + 1) / threads_;
  }

 private:
  int thread_, threads_;
  std::atomic<int64_t>& arrived_;
  int64_t& passed_;
};

class Pool {
 public:
  // `threads` counts the calling one. Worker i is bound to the i-th CPU of `cpus` where that is not empty.
  explicit Pool(int threads, std::vector<int> cpus = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Run work(team, context) on every thread; returns when all are done. One caller at a time: others wait. The work
  // must not throw.
  void run(void (*work)(Team&, void*), void* context);

 private:
  struct State;
  std::unique_ptr<State> state_;
  std::vector<std::thread> workers_;
};

}  // namespace pareto
