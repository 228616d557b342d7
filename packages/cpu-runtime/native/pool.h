// A thread pool for work that comes in bursts of many short steps: one wake-up per token, spin barriers within.
//
// No OpenMP: two copies of its runtime in one process slow each other down, and torch brings one. Between bursts the
// workers spin for at most 50 us and then sleep, so that torch's own threads find the cores free.
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
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

// Threads of a pool at most: its barriers spin, so that more threads than CPUs only hold each other up, and the
// system's set of CPUs (cpu_set_t) ends at 1024.
constexpr int kMostThreads = 1024;

// A child process (fork) has no threads but the one that forked: a pool that it inherits starts new workers with its
// first burst there.
class Pool {
 public:
  // `threads` counts the calling one. Workers run on `cpus`, anywhere where that is empty: where there are as many CPUs
  // as threads, worker i is bound to the i-th alone (the caller is thread 0), else each may run on all of them, and
  // several pools do not meet on the first ones. The calling thread is left alone, but with `bind_caller` it is bound
  // like a worker for the time of each burst. Throws std::runtime_error where the system refuses a thread: those that
  // were started have ended then.
  explicit Pool(int threads, std::vector<int> cpus = {}, bool bind_caller = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Run work(team, context) on every thread; returns when all are done. One caller at a time: others wait. The work
  // must not throw.
  void run(void (*work)(Team&, void*), void* context);

 private:
  struct Crew;
  cpu_set_t place(int thread) const;
  std::unique_ptr<Crew> started() const;
  void take_over();

  int threads_;
  std::vector<int> cpus_;
  bool bind_caller_;
  cpu_set_t caller_place_;
  std::unique_ptr<Crew> crew_;
  std::atomic<pid_t> owner_;  // the process that the crew's threads live in
};

}  // namespace pareto
