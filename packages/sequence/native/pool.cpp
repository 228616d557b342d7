#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace pareto {
namespace {

struct Job {
  int64_t items;
  void (*work)(int slot, int64_t item, void* context);
  void* context;
  cpu_set_t cpus;  // where the caller may run, and so where those that help it may
  std::atomic<int64_t> next{0};

  void take_items(int slot) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(slot, item, context);
  }
};

class Pool {
 public:
  void run(Job& job, int threads) {
    const std::unique_lock<std::mutex> alone(callers_, std::try_to_lock);
    if (threads < 2 || !alone) return job.take_items(0);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers(threads - 1);
      job_ = &job;
      slots_ = threads;
      next_slot_ = 1;
    }
    if (threads == 2)
      wake_.notify_one();
    else
      wake_.notify_all();
    job.take_items(0);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // no more items: a worker that wakes now goes back to sleep
    done_.wait(lock, [this] { return inside_ == 0; });
  }

 private:
  // As many as can be had: the work is done by those that there are.
  void start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void serve() {
    cpu_set_t bound;
    CPU_ZERO(&bound);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && next_slot_ < slots_; });
      Job& job = *job_;
      const int slot = next_slot_++;
      ++inside_;
      lock.unlock();
      if (!CPU_EQUAL(&bound, &job.cpus)) {
        bound = job.cpus;
        sched_setaffinity(0, sizeof bound, &bound);  // refused: the thread runs where it may
      }
      job.take_items(slot);
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int workers_ = 0, slots_ = 0, next_slot_ = 0, inside_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends.
std::atomic<Pool*> pool{nullptr};

// A child process has none of its parent's threads, and locks in whatever state they were: it starts afresh.
void start_afresh() { pool.store(nullptr); }

Pool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, start_afresh);
  static_cast<void>(registered);
  Pool* found = pool.load();
  if (found) return *found;
  Pool* made = new Pool;
  if (pool.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

void share_out(int threads, int64_t items, void (*work)(int slot, int64_t item, void* context), void* context) {
  Job job{items, work, context, {}};
  if (threads > items) threads = static_cast<int>(items);
  if (threads < 2) return job.take_items(0);
  if (sched_getaffinity(0, sizeof job.cpus, &job.cpus) != 0) return job.take_items(0);
  the_pool().run(job, threads);
}

}  // namespace pareto
