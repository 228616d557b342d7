// Programs, as Python builds and runs them.
#include "bind_program.h"

#include <map>

using namespace nb::literals;

namespace pareto {

void check_buffer(const Decoder& decoder, int buffer, int64_t width) {
  if (decoder.program.finished()) throw nb::value_error("the program is finished: no step can be added");
  if (decoder.program.width(buffer) != width)
    throw nb::value_error(("buffer " + std::to_string(buffer) + " is " + std::to_string(decoder.program.width(buffer)) +
                           " wide, the step needs " + std::to_string(width))
                              .c_str());
}

const float* vector_of(Decoder& decoder, const std::optional<Floats>& values, int64_t size, const char* what) {
  if (!values) return nullptr;
  if (static_cast<int64_t>(values->size()) != size)
    throw nb::value_error((std::string(what) + " must have " + std::to_string(size) + " values").c_str());
  decoder.kept.push_back(nb::cast(*values));
  return values->data();
}

namespace {

template <typename Value>
Value named(const char* what, const std::map<std::string, Value>& values, const std::string& name) {
  const auto found = values.find(name);
  if (found != values.end()) return found->second;
  std::string known;
  for (const auto& [key, value] : values) known += (known.empty() ? "" : ", ") + key;
  throw nb::value_error((std::string(what) + " must be one of " + known + ", not '" + name + "'").c_str());
}

void add_embed(Decoder& decoder, nb::ndarray<nb::c_contig, nb::device::cpu, nb::ndim<2>> table, int x, float scale) {
  const bool bf16 = table.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
  if (!bf16 && table.dtype() != nb::dtype<float>()) throw nb::value_error("the table must be fp32 or bf16");
  const int64_t vocabulary = static_cast<int64_t>(table.shape(0)), width = static_cast<int64_t>(table.shape(1));
  check_buffer(decoder, x, width);
  decoder.vocabulary = vocabulary;
  decoder.kept.push_back(nb::cast(table));
  decoder.program.add(embed_step(table.data(), bf16, vocabulary, width, scale, x));
}

// Returns the name of the kernel that was chosen.
std::string add_linear(Decoder& decoder, const Weight& weight, int x, std::optional<int> y, const std::string& norm,
                       std::optional<Floats> norm_weight, std::optional<Floats> norm_bias, float epsilon,
                       std::optional<Floats> bias, const std::string& activation, bool gated,
                       std::optional<int> residual, const std::string& kernel, const std::string& compute) {
  static const std::map<std::string, Norm> norms = {{"none", Norm::none}, {"rms", Norm::rms}, {"layer", Norm::layer}};
  static const std::map<std::string, Activation> activations = {{"none", Activation::none},
                                                                {"relu", Activation::relu},
                                                                {"gelu", Activation::gelu},
                                                                {"gelu_tanh", Activation::gelu_tanh},
                                                                {"silu", Activation::silu}};
  const Packed& w = weight.packed;
  const Kernel* chosen = choose(w, kernel.c_str(), compute.c_str());
  if (!chosen) throw nb::value_error(("no kernel '" + kernel + "' for these weights on this processor").c_str());
  if (gated && w.n % kPanel != 0) throw nb::value_error("a gated weight must have a multiple of 64 outputs");
  const int64_t outputs = gated ? w.n / 2 : w.n;
  // A layer may read the first columns of a wider buffer.
  if (decoder.program.width(x) < w.k) check_buffer(decoder, x, w.k);
  if (y) check_buffer(decoder, *y, outputs);
  if (residual) check_buffer(decoder, *residual, outputs);
  LinearStep step;
  step.kernel = chosen;
  step.weight = w;
  step.prologue.norm = named("norm", norms, norm);
  step.prologue.weight = vector_of(decoder, norm_weight, w.k, "norm_weight");
  step.prologue.bias = vector_of(decoder, norm_bias, w.k, "norm_bias");
  step.prologue.epsilon = epsilon;
  if (bias) {
    if (static_cast<int64_t>(bias->size()) != w.n) throw nb::value_error("bias must have a value per output");
    step.bias.assign(static_cast<size_t>(w.panels() * kPanel), 0.0f);
    std::copy(bias->data(), bias->data() + w.n, step.bias.begin());
  }
  step.activation = named("activation", activations, activation);
  step.gated = gated;
  step.x = x;
  step.y = y.value_or(-1);
  step.residual = residual.value_or(-1);
  step.logits = !y.has_value();
  if (step.logits) decoder.outputs = outputs;
  decoder.kept.push_back(weight.owner);
  decoder.program.add(linear_step(std::move(step)));
  return chosen->name;
}

void check_range(Ints values, int64_t limit, const char* what) {
  for (size_t i = 0; i < values.size(); ++i)
    if (values.data()[i] < 0 || values.data()[i] >= limit)
      throw nb::value_error(
          (std::string(what) + " " + std::to_string(values.data()[i]) + " is not below " + std::to_string(limit))
              .c_str());
}

// Two rows at one place of a cache would both write it.
void check_places(Ints slots, Ints positions) {
  std::vector<int64_t> places;
  places.reserve(slots.size());
  for (size_t i = 0; i < slots.size(); ++i)
    places.push_back(static_cast<int64_t>(slots.data()[i]) << 32 | positions.data()[i]);
  std::sort(places.begin(), places.end());
  const auto twice = std::adjacent_find(places.begin(), places.end());
  if (twice != places.end())
    throw nb::value_error(("position " + std::to_string(*twice & 0xffffffff) + " of slot " +
                           std::to_string(*twice >> 32) + " comes twice in one call")
                              .c_str());
}

void run(Decoder& decoder, Ints tokens, Ints slots, Ints positions, Ints want, Array<float, nb::ndim<2>> logits) {
  if (!decoder.program.finished()) throw nb::value_error("finish the program before running it");
  const size_t rows = tokens.size();
  if (rows == 0 || static_cast<int64_t>(rows) > decoder.program.max_rows())
    throw nb::value_error(
        ("a call takes 1 to " + std::to_string(decoder.program.max_rows()) + " rows, not " + std::to_string(rows))
            .c_str());
  if (slots.size() != rows || positions.size() != rows) throw nb::value_error("slots and positions: one per token");
  if (logits.shape(0) != want.size() || static_cast<int64_t>(logits.shape(1)) != decoder.outputs)
    throw nb::value_error("logits must be (rows wanted, vocabulary)");
  check_range(tokens, decoder.vocabulary, "token");
  check_range(want, static_cast<int64_t>(rows), "wanted row");
  for (size_t i = 1; i < want.size(); ++i)
    if (want.data()[i] <= want.data()[i - 1]) throw nb::value_error("wanted rows must ascend");
  if (decoder.slots) check_range(slots, decoder.slots, "slot");
  if (decoder.length) check_range(positions, decoder.length, "position");
  if (decoder.slots && rows > 1) check_places(slots, positions);
  Batch batch;
  batch.rows = static_cast<int64_t>(rows);
  batch.tokens = tokens.data();
  batch.slots = slots.data();
  batch.positions = positions.data();
  batch.wanted = static_cast<int64_t>(want.size());
  batch.want = want.data();
  batch.logits = logits.data();
  nb::gil_scoped_release release;
  decoder.program.run(batch);
}

}  // namespace

void bind_program(nb::module_& module) {
  nb::class_<Decoder> program(module, "Program");
  program.def(nb::init<std::shared_ptr<Pool>, int64_t>(), "pool"_a, "max_rows"_a)
      .def(
          "buffer", [](Decoder& decoder, int64_t width) { return decoder.program.buffer(width); }, "width"_a)
      .def("embed", &add_embed, "table"_a, "x"_a, "scale"_a = 1.0f)
      .def("linear", &add_linear, "weight"_a, "x"_a, "y"_a = nb::none(), "norm"_a = "none",
           "norm_weight"_a = nb::none(), "norm_bias"_a = nb::none(), "epsilon"_a = 1e-5f, "bias"_a = nb::none(),
           "activation"_a = "none", "gated"_a = false, "residual"_a = nb::none(), "kernel"_a = "auto", "compute"_a = "")
      .def("finish", [](Decoder& decoder) { decoder.program.finish(); })
      .def("run", &run, "tokens"_a, "slots"_a, "positions"_a, "want"_a, "logits"_a)
      .def_prop_ro("planned_bytes", [](const Decoder& decoder) { return decoder.program.planned_bytes(); });
  bind_attention(module, program);
  bind_all_reduce(module, program);
}

}  // namespace pareto
