// Caches, attention steps and sampling, as Python uses them.
#include <nanobind/stl/variant.h>

#include <cmath>
#include <variant>

#include "attention.h"
#include "bind_program.h"
#include "ops.h"
#include "sampling.h"

using namespace nb::literals;

namespace pareto {
namespace {

// Far below where counting bytes would overflow.
constexpr double kMostValues = 0x1p50;

std::string text(int64_t value) { return std::to_string(value); }

void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

std::shared_ptr<Cache> make_cache(int64_t layers, int64_t slots, int64_t kv_heads, int64_t length, int64_t head_dim,
                                  const std::string& dtype) {
  require(layers > 0 && slots > 0 && kv_heads > 0 && length > 0 && head_dim > 0,
          "layers, slots, kv_heads, length and head_dim of a cache must be at least 1");
  const double values = 2.0 * static_cast<double>(layers) * static_cast<double>(slots) * static_cast<double>(kv_heads) *
                        static_cast<double>(length) * static_cast<double>(head_dim);
  require(values < kMostValues, "a cache of " + std::to_string(values) + " values is more than any machine holds");
  require(dtype == "fp32" || dtype == "bf16" || dtype == "int8",
          "dtype must be one of fp32, bf16, int8, not '" + dtype + "'");
  const CacheType type = dtype == "fp32" ? CacheType::fp32 : dtype == "bf16" ? CacheType::bf16 : CacheType::int8;
  return std::make_shared<Cache>(layers, slots, kv_heads, length, head_dim, type);
}

void check_index(int64_t value, int64_t limit, const char* what) {
  require(value >= 0 && value < limit, std::string(what) + " " + text(value) + " is not below " + text(limit));
}

void copy_slot(Cache& cache, int64_t from, int64_t to, int64_t tokens) {
  check_index(from, cache.slots(), "from_slot");
  check_index(to, cache.slots(), "to_slot");
  require(tokens >= 0 && tokens <= cache.length(),
          "tokens must be 0 to " + text(cache.length()) + ", not " + text(tokens));
  nb::gil_scoped_release release;
  cache.copy(from, to, tokens);
}

using Table = Array<const float, nb::ndim<2>>;

Rotary rotary_of(Decoder& decoder, const std::optional<Table>& table, bool interleaved, const Cache& cache) {
  Rotary rotary;
  if (!table) return rotary;
  const int64_t rows = static_cast<int64_t>(table->shape(0)), width = static_cast<int64_t>(table->shape(1));
  require(rows >= cache.length(),
          "rotary must have a row for each of the cache's " + text(cache.length()) + " positions, not " + text(rows));
  require(
      width > 0 && width % 2 == 0 && width <= cache.head_dim(),
      "rotary must have an even number of columns up to head_dim " + text(cache.head_dim()) + ", not " + text(width));
  decoder.kept.push_back(nb::cast(*table));
  rotary.cos_sin = table->data();
  rotary.dim = width;
  rotary.interleaved = interleaved;
  return rotary;
}

void add_attention(Decoder& decoder, std::shared_ptr<Cache> cache, int64_t layer, int x, int y, int64_t heads,
                   int64_t kv_heads, int64_t head_dim, float scale, std::optional<Table> rotary, bool interleaved,
                   std::optional<Floats> slopes, int64_t window, std::optional<Floats> q_norm,
                   std::optional<Floats> k_norm, float norm_epsilon, const std::string& isa) {
  require(kv_heads == cache->kv_heads() && head_dim == cache->head_dim(),
          "the cache is made for " + text(cache->kv_heads()) + " key-value heads of " + text(cache->head_dim()) +
              " values, the step has " + text(kv_heads) + " of " + text(head_dim));
  require(heads > 0 && heads % kv_heads == 0,
          "heads must be a multiple of kv_heads " + text(kv_heads) + ", not " + text(heads));
  check_index(layer, cache->layers(), "layer");
  require(window >= 0, "window must be at least 0 (0: none), not " + text(window));
  require(std::isfinite(scale), "scale must be finite");
  require(x != y, "x and y must be different buffers");
  check_buffer(decoder, x, (heads + 2 * kv_heads) * head_dim);
  check_buffer(decoder, y, heads * head_dim);
  AttentionStep step;
  step.ops = ops_named(isa.c_str());
  require(step.ops, "isa must be auto, scalar, avx2, avx512f or avx512_bf16, and on this processor, not '" + isa + "'");
  step.layer = layer;
  step.x = x;
  step.y = y;
  step.heads = heads;
  step.scale = scale;
  step.rotary = rotary_of(decoder, rotary, interleaved, *cache);
  step.slopes = vector_of(decoder, slopes, heads, "slopes");
  step.window = window;
  step.q_norm = vector_of(decoder, q_norm, head_dim, "q_norm");
  step.k_norm = vector_of(decoder, k_norm, head_dim, "k_norm");
  step.norm_epsilon = norm_epsilon;
  decoder.slots = decoder.slots ? std::min(decoder.slots, cache->slots()) : cache->slots();
  decoder.length = decoder.length ? std::min(decoder.length, cache->length()) : cache->length();
  step.cache = std::move(cache);
  const int threads = decoder.program.pool().threads();
  decoder.program.add(attention_step(std::move(step), threads));
}

// What the last call left in a buffer, for tests: later steps may have used its memory again.
void read_buffer(const Decoder& decoder, int buffer, Array<float, nb::ndim<2>> out) {
  require(decoder.program.finished(), "finish the program before reading its buffers");
  const int64_t rows = static_cast<int64_t>(out.shape(0)), width = decoder.program.width(buffer);
  require(rows <= decoder.program.max_rows() && static_cast<int64_t>(out.shape(1)) == width,
          "out must be (up to " + text(decoder.program.max_rows()) + ", " + text(width) + ")");
  std::copy_n(decoder.program.at(buffer), rows * width, out.data());
}

// One value for all rows, or one for each.
template <typename Number, typename Element>
using PerRow = std::variant<Number, Array<const Element, nb::ndim<1>>>;
using Reals = PerRow<double, float>;
using Counts = PerRow<int64_t, int32_t>;

template <typename Number, typename Element>
Number value_of(const PerRow<Number, Element>& values, size_t row) {
  if (const Number* one = std::get_if<Number>(&values)) return *one;
  return static_cast<Number>(std::get<1>(values).data()[row]);
}

template <typename Number, typename Element>
void check_rows(const PerRow<Number, Element>& values, size_t rows, const char* what) {
  if (const auto* array = std::get_if<1>(&values))
    require(array->size() == rows,
            std::string(what) + " must be one number, or one for each of the " + std::to_string(rows) + " rows");
}

void check_sampling(const Sampling& how, double random, size_t row) {
  const std::string of = " of row " + std::to_string(row) + " must be ";
  require(how.temperature >= 0.0 && std::isfinite(how.temperature), "temperature" + of + "at least 0 and finite");
  require(how.top_k >= 0, "top_k" + of + "at least 0 (0: all)");
  require(how.top_p > 0.0 && how.top_p <= 1.0, "top_p" + of + "above 0 and at most 1");
  require(how.min_p >= 0.0 && how.min_p <= 1.0, "min_p" + of + "from 0 to 1");
  require(random >= 0.0 && random < 1.0, "the random number" + of + "in [0, 1)");
}

using Tokens = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;

Tokens sample_rows(Table logits, const Reals& temperature, const Counts& top_k, const Reals& top_p, const Reals& min_p,
                   const std::optional<Reals>& random) {
  const size_t rows = logits.shape(0), vocabulary = logits.shape(1);
  require(vocabulary > 0 || rows == 0, "logits must have at least one column");
  check_rows(temperature, rows, "temperature");
  check_rows(top_k, rows, "top_k");
  check_rows(top_p, rows, "top_p");
  check_rows(min_p, rows, "min_p");
  const auto* each = random ? std::get_if<1>(&*random) : nullptr;
  require(!each || each->size() == rows, "random must have a number for each row");
  std::vector<Sampling> how(rows);
  std::vector<double> numbers(rows, 0.0);
  for (size_t row = 0; row < rows; ++row) {
    how[row] = {value_of(temperature, row), value_of(top_k, row), value_of(top_p, row), value_of(min_p, row)};
    require(random || how[row].temperature == 0.0, "sampling needs a random number for each row");
    if (random) numbers[row] = value_of(*random, row);
    check_sampling(how[row], numbers[row], row);
  }
  auto* tokens = new std::vector<int32_t>(rows);
  nb::capsule owner(tokens, [](void* p) noexcept { delete static_cast<std::vector<int32_t>*>(p); });
  size_t bad = rows;
  Sampled reason = Sampled::ok;
  {
    nb::gil_scoped_release release;
    SamplingRoom room;
    for (size_t row = 0; row < rows && bad == rows; ++row) {
      reason = sample(logits.data() + row * vocabulary, static_cast<int64_t>(vocabulary), how[row], numbers[row], room,
                      tokens->data() + row);
      if (reason != Sampled::ok) bad = row;
    }
  }
  require(reason != Sampled::nan, "row " + std::to_string(bad) + " of the logits holds NaN or infinity");
  require(reason != Sampled::none, "row " + std::to_string(bad) + " of the logits allows no token: all are -infinity");
  return Tokens(tokens->data(), {rows}, owner);
}

}  // namespace

void bind_attention(nb::module_& module, nb::class_<Decoder>& program) {
  nb::class_<Cache>(module, "Cache", "Keys and values of the tokens of several slots, preallocated.")
      .def(nb::new_(&make_cache), "layers"_a, "slots"_a, "kv_heads"_a, "length"_a, "head_dim"_a, "dtype"_a = "fp32")
      .def("copy", &copy_slot, "from_slot"_a, "to_slot"_a, "tokens"_a,
           "Give one slot the first tokens of another, in every layer.")
      .def_prop_ro("bytes", &Cache::bytes)
      .def_prop_ro("slots", &Cache::slots)
      .def_prop_ro("length", &Cache::length);
  program.def("attention", &add_attention, "cache"_a, "layer"_a, "x"_a, "y"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
              "scale"_a, "rotary"_a = nb::none(), "interleaved"_a = false, "slopes"_a = nb::none(), "window"_a = 0,
              "q_norm"_a = nb::none(), "k_norm"_a = nb::none(), "norm_epsilon"_a = 1e-6f, "isa"_a = "auto",
              "Attend each row of x = [queries | keys | values] over its slot's cache, and write the context to y. "
              "Rotates and appends the row first, at its position.");
  program.def("read", &read_buffer, "buffer"_a, "out"_a, "Copy the first rows of a buffer that the last step wrote.");
  module.def(
      "sample", &sample_rows, "logits"_a, "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "min_p"_a = 0.0,
      "random"_a = nb::none(),
      "The next token of each row of logits (rows, vocabulary) as int32: the largest where temperature is 0, else "
      "drawn by a uniform number in [0, 1) from what temperature, top_k, top_p and min_p leave. Each is one number or "
      "one per row.");
}

}  // namespace pareto
