// INT4 (and INT8) weights, int8 compute, on AVX512_VNNI: table 3.1, row "FP32 FP32 INT8 AVX512_VNNI".
//
// Weight codes are unsigned and activations signed, which is what vpdpbusd multiplies, so no sign is mended per
// product; the zero point is taken off by starting each group's sum at -zero * sum(activations).
//
// Few rows (the next token): bound by memory, so each thread reads one sequential stream, unpacks codes in registers
// and uses them for all rows, up to 8, at once. Many rows (the prompt): a panel is unpacked once into the L2 cache, in
// four strips of 16 outputs, and tiles of 6 rows by 32 outputs run over it. Both add up in the same order: int8
// products within a group exactly, groups of a span, on which a row has one scale, times the weights' scales, then
// spans times that scale.
#include <immintrin.h>

#include "../epilogue.inl"
#include "../int8_rows.inl"
#include "../kernel.h"

namespace pareto {
namespace {

constexpr int kStrips = 4;
constexpr int64_t kLanes = 16;
constexpr int64_t kFewRows = 8;
// Rows of one pass over unpacked panels, and inputs that are unpacked at a time.
constexpr int64_t kPassRows = 43 * kTileRows;
constexpr int64_t kChunkInputs = 2048;
// How far ahead of its stream a thread asks for memory: the hardware's own prefetching ends at 4 KiB pages.
constexpr int64_t kAhead = 8192;

inline __m512i broadcast4(const int8_t* at) {
  int32_t four;
  std::memcpy(&four, at, 4);
  return _mm512_set1_epi32(four);
}

// The products are written out, since gcc copies every sum before it adds to it through the intrinsic.
inline void add_products(__m512i& sums, __m512i codes, __m512i activations) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(activations));
}

inline __m512 half_scales(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline __m512i zero_points(const uint8_t* at) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// Strips of one quad, from an even one on, as unsigned bytes.
template <bool kBytes, int kCount>
inline void load_strips(const uint8_t* at, __m512i (&strip)[kCount]) {
  if constexpr (kBytes) {
    for (int s = 0; s < kCount; ++s) strip[s] = _mm512_loadu_si512(at + 64 * s);
  } else {
    const __m512i low = _mm512_set1_epi8(0x0f);
    for (int pair = 0; pair < kCount / 2; ++pair) {
      const __m512i both = _mm512_loadu_si512(at + 64 * pair);
      strip[2 * pair] = _mm512_and_si512(both, low);
      strip[2 * pair + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
  }
}

template <bool kZeros>
inline __m512i start_of(int32_t start, __m512i zeros) {
  const __m512i all = _mm512_set1_epi32(start);
  if constexpr (kZeros) return _mm512_mullo_epi32(all, zeros);
  return all;
}

// A span's sum goes on with a group's products; a row's sum with those of a span.
inline __m512 add_group(__m512 span, __m512i dot, __m512 weight_scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), weight_scale, span);
}

inline void add_span(float* sum, __m512 span, float row_scale) {
  _mm512_storeu_ps(sum, _mm512_fmadd_ps(span, _mm512_set1_ps(row_scale), _mm512_loadu_ps(sum)));
}

// R rows through one panel, straight from the packed stream; strips by twos, where all four at once would need more
// sums than there are registers.
template <int R, bool kBytes, bool kZeros>
void few_rows(const Packed& w, const uint8_t* tile, const uint8_t* panel, float* sums) {
  const Int8Tile rows(w, tile, R);
  const int64_t groups = w.groups(), quads = w.quads(), span = span_groups(w), group_bytes = w.group_bytes();
  constexpr int kTogether = R <= 3 ? kStrips : 2;
  constexpr int64_t kHeader = 2 * kPanel + (kZeros ? kPanel : 0);
  constexpr int64_t kQuadBytes = kBytes ? 256 : 128, kShare = kQuadBytes * kTogether / kStrips;
  for (int i = 0; i < R * kStrips; ++i) _mm512_storeu_ps(sums + i * kLanes, _mm512_setzero_ps());
  for (int64_t first = 0; first < groups; first += span) {
    for (int from = 0; from < kStrips; from += kTogether) {
      __m512 spans[R][kTogether] = {};
      for (int64_t g = first; g < first + span; ++g) {
        const uint8_t* header = panel + g * group_bytes;
        _mm_prefetch(reinterpret_cast<const char*>(header + kAhead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(header + kAhead + 64), _MM_HINT_T0);
        __m512i dot[R][kTogether];
        for (int s = 0; s < kTogether; ++s) {
          const uint8_t* at = header + 2 * kPanel + kLanes * (from + s);
          const __m512i zeros = kZeros ? zero_points(at) : _mm512_setzero_si512();
          for (int r = 0; r < R; ++r) dot[r][s] = start_of<kZeros>(rows.starts[g * R + r], zeros);
        }
        const uint8_t* stream = header + kHeader + from / kTogether * kShare;
        const int8_t* four = rows.codes + g * quads * kQuad * R;
        for (int64_t q = 0; q < quads; ++q) {
          for (int64_t line = 0; line < kShare; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(stream + kAhead + line), _MM_HINT_T0);
          __m512i strip[kTogether];
          load_strips<kBytes, kTogether>(stream, strip);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const __m512i all = broadcast4(four + kQuad * r);
            for (int s = 0; s < kTogether; ++s) add_products(dot[r][s], strip[s], all);
          }
          four += kQuad * R;
          stream += kQuadBytes;
        }
        for (int s = 0; s < kTogether; ++s) {
          const __m512 scale = half_scales(header + 2 * kLanes * (from + s));
          for (int r = 0; r < R; ++r) spans[r][s] = add_group(spans[r][s], dot[r][s], scale);
        }
      }
      for (int s = 0; s < kTogether; ++s)
        for (int r = 0; r < R; ++r)
          add_span(sums + r * kPanel + (from + s) * kLanes, spans[r][s], rows.scales[first * R + r]);
    }
  }
}

// A chunk of a panel, unpacked: four strips of (quads of the chunk, 64 bytes), then scales and zero points per group.
struct Chunk {
  uint8_t* strips;
  int64_t strip_bytes;
  float* scales;   // (groups, 64)
  int32_t* zeros;  // (groups, 64)
};

// Whole spans.
int64_t groups_per_chunk(const Packed& w) {
  const int64_t span = span_groups(w), groups = kChunkInputs / w.group / span * span;
  return groups < span ? span : (groups < w.groups() ? groups : w.groups());
}

Chunk chunk_at(const Packed& w, uint8_t* scratch) {
  const int64_t groups = groups_per_chunk(w), strip = groups * w.quads() * 64;
  Chunk chunk;
  chunk.strips = scratch;
  chunk.strip_bytes = strip;
  chunk.scales = reinterpret_cast<float*>(scratch + kStrips * strip);
  chunk.zeros = reinterpret_cast<int32_t*>(chunk.scales + groups * kPanel);
  return chunk;
}

template <bool kBytes, bool kZeros>
void unpack_chunk(const Packed& w, const uint8_t* stream, int64_t groups, const Chunk& chunk) {
  const int64_t quads = w.quads();
  uint8_t* out = chunk.strips;
  for (int64_t g = 0; g < groups; ++g) {
    for (int s = 0; s < kStrips; ++s) {
      _mm512_storeu_ps(chunk.scales + g * kPanel + s * kLanes, half_scales(stream + 2 * kLanes * s));
      if constexpr (kZeros)
        _mm512_storeu_si512(chunk.zeros + g * kPanel + s * kLanes, zero_points(stream + 2 * kPanel + kLanes * s));
    }
    stream += 2 * kPanel + (kZeros ? kPanel : 0);
    for (int64_t q = 0; q < quads; ++q) {
      __m512i strip[kStrips];
      load_strips<kBytes, kStrips>(stream, strip);
      for (int s = 0; s < kStrips; ++s) _mm512_storeu_si512(out + s * chunk.strip_bytes, strip[s]);
      out += 64;
      stream += kBytes ? 256 : 128;
    }
  }
}

// What is read next from memory is asked for while this chunk is worked on: `step` bytes with each quad.
struct Ahead {
  const uint8_t* at;
  int64_t step;
};

// R rows by two strips over one chunk, of a tile of `stride` rows; `sums` go on from what earlier chunks left there.
// kOne: spans of one group, whose sums stay in registers.
template <int R, bool kZeros, bool kOne>
void strip_tile(const Packed& w, const Int8Tile& rows, int64_t stride, int64_t first_row, int64_t first_group,
                int64_t groups, const Chunk& chunk, int strip, float* sums, Ahead& ahead) {
  const int64_t quads = w.quads(), step = kQuad * stride;
  const int8_t* codes = rows.codes + first_group * quads * step + kQuad * first_row;
  const uint8_t* weights = chunk.strips + strip * chunk.strip_bytes;
  const uint8_t* others = weights + chunk.strip_bytes;
  const float* scales = chunk.scales + strip * kLanes;
  const int32_t* zeros = chunk.zeros + strip * kLanes;
  const float* row_scales = rows.scales + first_group * stride + first_row;
  const int32_t* starts = rows.starts + first_group * stride + first_row;
  const int64_t span = kOne ? 1 : span_groups(w);
  __m512 totals[R][2];
  if constexpr (kOne)
    for (int s = 0; s < 2; ++s)
      for (int r = 0; r < R; ++r) totals[r][s] = _mm512_loadu_ps(sums + r * kPanel + (strip + s) * kLanes);
  for (int64_t first = 0; first < groups; first += span) {
    __m512 spans[R][2] = {};
    for (int64_t g = first; g < first + span; ++g) {
      __m512i dot[R][2];
      for (int s = 0; s < 2; ++s) {
        const __m512i zero = kZeros ? _mm512_loadu_si512(zeros + g * kPanel + s * kLanes) : _mm512_setzero_si512();
        for (int r = 0; r < R; ++r) dot[r][s] = start_of<kZeros>(starts[g * stride + r], zero);
      }
      for (int64_t q = 0; q < quads; ++q) {
        const __m512i one = _mm512_loadu_si512(weights), two = _mm512_loadu_si512(others);
        _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
        ahead.at += ahead.step;
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const __m512i four = broadcast4(codes + kQuad * r);
          add_products(dot[r][0], one, four);
          add_products(dot[r][1], two, four);
        }
        codes += step;
        weights += 64;
        others += 64;
      }
      for (int s = 0; s < 2; ++s) {
        const __m512 scale = _mm512_loadu_ps(scales + g * kPanel + s * kLanes);
        for (int r = 0; r < R; ++r) spans[r][s] = add_group(spans[r][s], dot[r][s], scale);
      }
    }
    for (int s = 0; s < 2; ++s)
      for (int r = 0; r < R; ++r) {
        const float row_scale = row_scales[first * stride + r];
        if constexpr (kOne)
          totals[r][s] = _mm512_fmadd_ps(spans[r][s], _mm512_set1_ps(row_scale), totals[r][s]);
        else
          add_span(sums + r * kPanel + (strip + s) * kLanes, spans[r][s], row_scale);
      }
  }
  if constexpr (kOne)
    for (int s = 0; s < 2; ++s)
      for (int r = 0; r < R; ++r) _mm512_storeu_ps(sums + r * kPanel + (strip + s) * kLanes, totals[r][s]);
}

using FewRows = void (*)(const Packed&, const uint8_t*, const uint8_t*, float*);
using StripTile = void (*)(const Packed&, const Int8Tile&, int64_t, int64_t, int64_t, int64_t, const Chunk&, int,
                           float*, Ahead&);

template <bool kBytes, bool kZeros>
constexpr FewRows kFew[] = {few_rows<1, kBytes, kZeros>, few_rows<2, kBytes, kZeros>, few_rows<3, kBytes, kZeros>,
                            few_rows<4, kBytes, kZeros>, few_rows<5, kBytes, kZeros>, few_rows<6, kBytes, kZeros>,
                            few_rows<7, kBytes, kZeros>, few_rows<8, kBytes, kZeros>};

template <bool kZeros, bool kOne>
constexpr StripTile kStrip[] = {strip_tile<1, kZeros, kOne>, strip_tile<2, kZeros, kOne>, strip_tile<3, kZeros, kOne>,
                                strip_tile<4, kZeros, kOne>, strip_tile<5, kZeros, kOne>, strip_tile<6, kZeros, kOne>};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <bool kBytes, bool kZeros>
void many_rows(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
               uint8_t* scratch) {
  const Chunk chunk = chunk_at(w, scratch);
  const StripTile* strips = span_groups(w) == 1 ? kStrip<kZeros, true> : kStrip<kZeros, false>;
  const int64_t per_chunk = groups_per_chunk(w), row_bytes = int8_row_bytes(w);
  float* sums = reinterpret_cast<float*>(chunk.zeros + per_chunk * kPanel);
  for (int64_t from = 0; from < m; from += kPassRows) {
    const int64_t pass = smaller(m - from, kPassRows);
    for (int64_t panel = first; panel < last; ++panel) {
      std::memset(sums, 0, static_cast<size_t>(pass * kPanel) * sizeof(float));
      for (int64_t group = 0; group < w.groups(); group += per_chunk) {
        const int64_t groups = smaller(per_chunk, w.groups() - group);
        const uint8_t* stream = w.data + panel * w.panel_bytes() + group * w.group_bytes();
        const int64_t bytes = groups * w.group_bytes();
        const int64_t turns = (pass + kTileRows - 1) / kTileRows * kStrips * groups * w.quads();
        unpack_chunk<kBytes, kZeros>(w, stream, groups, chunk);
        Ahead ahead = {stream + bytes, (bytes + turns - 1) / turns};
        for (int64_t row = 0; row < pass; row += kTileRows) {
          const int64_t rows = smaller(pass - row, kTileRows);
          const Int8Tile tile(w, prepared + (from + row) * row_bytes, rows);
          for (int strip = 0; strip < kStrips; strip += 2)
            for (int64_t sub = 0; sub < rows; sub += 6)
              strips[smaller(rows - sub, 6) - 1](w, tile, rows, sub, group, groups, chunk, strip,
                                                 sums + (row + sub) * kPanel, ahead);
        }
      }
      for (int64_t row = 0; row < pass; ++row) finish(e, w.n, from + row, panel, sums + row * kPanel);
    }
  }
}

template <bool kBytes, bool kZeros>
void multiply_as(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
                 uint8_t* scratch) {
  if (m > kFewRows) return many_rows<kBytes, kZeros>(w, prepared, m, first, last, e, scratch);
  alignas(64) float sums[kFewRows * kPanel];
  for (int64_t panel = first; panel < last; ++panel) {
    kFew<kBytes, kZeros>[m - 1](w, prepared, w.data + panel * w.panel_bytes(), sums);
    for (int64_t row = 0; row < m; ++row) finish(e, w.n, row, panel, sums + row * kPanel);
  }
}

void multiply(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
              uint8_t* scratch) {
  if (m == 0 || first >= last) return;
  if (w.store == Store::u8)
    return w.asymmetric ? multiply_as<true, true>(w, prepared, m, first, last, e, scratch)
                        : multiply_as<true, false>(w, prepared, m, first, last, e, scratch);
  return w.asymmetric ? multiply_as<false, true>(w, prepared, m, first, last, e, scratch)
                      : multiply_as<false, false>(w, prepared, m, first, last, e, scratch);
}

int64_t scratch_bytes(const Packed& w) {
  const int64_t groups = groups_per_chunk(w);
  return kStrips * groups * w.quads() * 64 + groups * kPanel * 8 + kPassRows * kPanel * 4;
}

bool supports(const Packed& w) { return !w.dense() && w.group <= kLongestInt8Group; }

}  // namespace

extern const Kernel kAvx512Vnni;
const Kernel kAvx512Vnni = {"avx512_vnni",  "int8",       Isa::avx512_vnni, supports,
                            int8_row_bytes, int8_prepare, scratch_bytes,    multiply};

}  // namespace pareto
