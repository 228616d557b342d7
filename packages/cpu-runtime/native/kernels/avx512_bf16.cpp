// bf16 compute on AVX512_BF16: table 3.1, row "FP32 FP32 BF16".
#include "bf16.inl"

namespace pareto {
namespace {

struct Bf16 : Bf16Values {
  static void step(Acc& acc, __m512i word, __m512i row) {
    acc = _mm512_dpbf16_ps(acc, __builtin_bit_cast(__m512bh, word), __builtin_bit_cast(__m512bh, row));
  }
};

using Maths = Half<Bf16>;

}  // namespace

extern const Kernel kAvx512Bf16;
const Kernel kAvx512Bf16 = {"avx512_bf16",  "bf16",          Isa::avx512_bf16,     supports<Maths>, row_bytes<Maths>,
                            Maths::prepare, scratch_bytes<Maths>, multiply<Maths>};

}  // namespace pareto
