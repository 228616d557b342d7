#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

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

// Where the calling thread may run from now on; where the system refuses, it stays where it was.
void bind(const cpu_set_t& set) { pthread_setaffinity_np(pthread_self(), sizeof(set), &set); }

// Binds the calling thread for as long as this object lives.
class Bound {
 public:
  Bound(bool wanted, const cpu_set_t& set)
      : bound_(wanted && pthread_getaffinity_np(pthread_self(), sizeof(before_), &before_) == 0) {
    if (bound_) bind(set);
  }
  ~Bound() {
    if (bound_) bind(before_);
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

 private:
  cpu_set_t before_;
  bool bound_;
};

// Two threads of a child process may both find that the pool is their parent's.
std::mutex taking_over;

}  // namespace

// The workers, and what they share with the caller.
struct alignas(64) Pool::Crew {
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

  std::vector<std::thread> workers;

  void serve(int thread, int threads, cpu_set_t where, bool anywhere) {
    if (!anywhere) bind(where);
    uint32_t seen = 0;
    for (;;) {
      seen = next(seen);
      if (ends) return;
      int64_t passed = 0;
      Team team(thread, threads, arrived, passed);
      work(team, context);
      working.fetch_sub(1, std::memory_order_release);
    }
  }

  // Ends the workers, all of them or those that were started.
  ~Crew() {
    ends = true;
    burst.fetch_add(1);
    futex(burst, FUTEX_WAKE_PRIVATE, 1 << 30);
    for (auto& worker : workers) worker.join();
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

Pool::Pool(int threads, std::vector<int> cpus, bool bind_caller)
    : threads_(threads),
      cpus_(std::move(cpus)),
      bind_caller_(bind_caller),
      caller_place_(place(0)),
      crew_(started()),
      owner_(getpid()) {}

cpu_set_t Pool::place(int thread) const {
  cpu_set_t set;
  CPU_ZERO(&set);
  const bool own = cpus_.size() == static_cast<size_t>(threads_);
  for (size_t i = 0; i < cpus_.size(); ++i)
    if (!own || i == static_cast<size_t>(thread)) CPU_SET(static_cast<size_t>(cpus_[i]), &set);
  return set;
}

std::unique_ptr<Pool::Crew> Pool::started() const {
  auto crew = std::make_unique<Crew>();
  crew->workers.reserve(static_cast<size_t>(threads_ - 1));
  for (int i = 1; i < threads_; ++i) {
    try {
      crew->workers.emplace_back(&Crew::serve, crew.get(), i, threads_, place(i), cpus_.empty());
    } catch (const std::system_error& error) {
      throw std::runtime_error("the system refused thread " + std::to_string(i + 1) + " of " +
                               std::to_string(threads_) + " (" + error.what() + "): ask for fewer threads");
    }
  }
  return crew;
}

Pool::~Pool() {
  // The parent's threads are not here to be joined, nor can what they hold be freed.
  if (owner_.load(std::memory_order_relaxed) != getpid()) static_cast<void>(crew_.release());
}

// Start a crew in this process where the pool was inherited from its parent.
void Pool::take_over() {
  const std::lock_guard<std::mutex> one(taking_over);
  if (owner_.load(std::memory_order_relaxed) == getpid()) return;
  auto crew = started();
  static_cast<void>(crew_.release());  // as in the destructor
  crew_ = std::move(crew);
  owner_.store(getpid(), std::memory_order_release);
}

void Pool::run(void (*work)(Team&, void*), void* context) {
  if (owner_.load(std::memory_order_acquire) != getpid()) take_over();
  Crew& c = *crew_;
  const std::lock_guard<std::mutex> one(c.callers);
  const Bound bound(bind_caller_ && !cpus_.empty(), caller_place_);
  c.work = work;
  c.context = context;
  c.arrived.store(0, std::memory_order_relaxed);
  c.working.store(threads_ - 1, std::memory_order_relaxed);
  c.burst.fetch_add(1);
  if (c.sleepers.load() > 0) futex(c.burst, FUTEX_WAKE_PRIVATE, 1 << 30);
  int64_t passed = 0;
  Team team(0, threads_, c.arrived, passed);
  work(team, context);
  for (int pauses = 1; c.working.load(std::memory_order_acquire) > 0; ++pauses) {
    _mm_pause();
    if (pauses % kPausesPerYield == 0) sched_yield();
  }
}

}  // namespace pareto
