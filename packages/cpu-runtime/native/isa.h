// Which instruction sets this processor has and this operating system lets us use.
#pragma once

#include <string>
#include <vector>

namespace pareto {

enum class Isa { scalar, avx2, avx512f, avx_vnni, avx512_vnni, avx512_bf16, avx512_fp16, amx_int8, amx_bf16 };

// Asked of CPUID, of XCR0 (the operating system must save the registers) and, for AMX, of the kernel, which grants the
// tile registers on request. Never of the vendor: the same bits mean the same instructions on every make.
bool available(Isa isa);

const char* name(Isa isa);

// Every instruction set that is available, the scalar one first.
std::vector<std::string> available_names();

}  // namespace pareto
