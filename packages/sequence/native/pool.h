// Threads that share out independent items of work, and sleep in between.
//
// No OpenMP: two copies of its runtime in one process slow each other down, and torch brings one. An idle worker never
// spins, and the caller does not wait for one that has not begun, so torch's own threads find the cores free.
#pragma once

#include <cstdint>

namespace pareto {

// Call work(slot, item, context) for every item in [0, items), by at most `threads` threads, of which the calling one
// is the first; returns when all are done. Slots are below `threads`, and two calls at a time never have the same.
// Which thread takes which item is left open. While another call has the workers, the calling thread does everything
// itself. The work must not throw.
void share_out(int threads, int64_t items, void (*work)(int slot, int64_t item, void* context), void* context);

}  // namespace pareto
