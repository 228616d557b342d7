#include "memory.h"

#include <sys/mman.h>

#include <new>

namespace pareto {
namespace {

constexpr int64_t kHugePage = 2 << 20;

}  // namespace

Block::Block(int64_t bytes) : bytes_(bytes) {
  const int64_t unit = bytes >= kHugePage ? kHugePage : 4096;
  mapped_ = (bytes + unit) / unit * unit + (unit == kHugePage ? unit : 0);
  void* at = mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(at);
  if (unit == kHugePage) {
    // Keep the part that starts on a huge page.
    const int64_t lead = (kHugePage - reinterpret_cast<int64_t>(data_) % kHugePage) % kHugePage;
    if (lead) munmap(data_, static_cast<size_t>(lead));
    data_ += lead;
    mapped_ -= lead;
    madvise(data_, static_cast<size_t>(mapped_), MADV_HUGEPAGE);
  }
}

Block::~Block() { munmap(data_, static_cast<size_t>(mapped_)); }

}  // namespace pareto
