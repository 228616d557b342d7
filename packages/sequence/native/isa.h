// Which of the kernels' instruction sets this processor has and this operating system lets us use.
#pragma once

namespace pareto {

enum class Isa { baseline, avx2, avx512f };

// Asked of CPUID and of XCR0 (the operating system must save the registers), never of the vendor.
bool available(Isa isa);

}  // namespace pareto
