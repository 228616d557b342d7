// Large blocks of memory: aligned to pages, in huge pages where the kernel grants them (five percent of the time of a
// token that reads all weights).
#pragma once

#include <cstdint>
#include <memory>

namespace pareto {

class Block {
 public:
  explicit Block(int64_t bytes);  // zeros; throws std::bad_alloc
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  uint8_t* data_;
  int64_t bytes_, mapped_;
};

}  // namespace pareto
