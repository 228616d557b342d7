// Sums over processes that each hold a part of every matrix: partial results go through shared memory.
//
// Every rank writes its rows to its own place, waits for the others, and adds all places in the order of the ranks: all
// get bitwise the same sum. Two sets of places take turns, so that nobody writes where another may still read.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "program.h"

namespace pareto {

class Exchange {
 public:
  // `memory` is shared by all ranks, zero at first, bytes(ranks, floats) long and aligned to 64. A rank that waits for
  // longer than `timeout_s` gives up, and all others with it.
  Exchange(uint8_t* memory, int ranks, int rank, int64_t floats, double timeout_s);

  static int64_t bytes(int64_t ranks, int64_t floats);

  int ranks() const { return ranks_; }
  int64_t floats() const { return floats_; }
  // Where `rank` puts its partial results in this turn.
  float* place(int rank) const;
  float* mine() const { return place(rank_); }
  // Say that this rank's partial results are written, and wait for the others'. Called by one thread.
  void meet();
  // The next turn. Called by one thread, when all of the team have read.
  void turn() { ++turn_; }
  // Make every rank give up; may be called from any thread.
  void stop();
  bool stopped() const;

 private:
  std::atomic<int64_t>& arrived(int rank) const;

  uint8_t* memory_;
  int ranks_, rank_;
  int64_t floats_, turn_ = 0;
  double timeout_s_;
};

// y = residual + sum over ranks of x.
std::unique_ptr<Step> all_reduce_step(std::shared_ptr<Exchange> exchange, int x, int residual, int y);

}  // namespace pareto
