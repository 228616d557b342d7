// Included by each of the kernels' files after loops.inl: layer norm over channels, SiLU and the residual, for rows
// that lie channel after channel. Tiles of positions are worked on in a copy without gaps: rows whose length is a power
// of two would otherwise meet in a few sets of the cache.
#pragma once

namespace pareto {
namespace {

typedef int Ints __attribute__((vector_size(4 * kLanes)));

inline Floats chosen(Ints mask, Floats a, Floats b) { return mask ? a : b; }

// exp(x), relative error below 3e-7; x is held within the range in which it is a normal number.
inline Floats exp_of(Floats x) {
  x = chosen(x < -87.0f, all(-87.0f), chosen(x > 88.0f, all(88.0f), x));
  // Adding 1.5 * 2^23 rounds to a whole number, and leaves it in the lowest bits.
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  const Floats r = x - n * 0.693145751953125f - n * 1.42860682030941723e-6f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  const Ints power = (bits - 0x4b400000 + 127) << 23;
  Floats scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  return p * scale;
}

inline Floats sigmoid_of(Floats x) { return 1.0f / (1.0f + exp_of(-x)); }

inline Floats root_of(Floats x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

inline float total_of(Floats x) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// mean and 1 / sqrt(variance + epsilon) over the channels; copies the tile to `packed`, a row `count` long.
void norm_statistics(const NormTile& tile, const float* c, float* packed, float* mean, float* rstd) {
  const float inverse = 1.0f / static_cast<float>(tile.width);
  for (int64_t i = 0; i < tile.count; i += kLanes) store(mean + i, Floats{});
  for (int64_t d = 0; d < tile.width; ++d)
    for (int64_t i = 0; i < tile.count; i += kLanes) {
      const Floats value = load(c + d * tile.stride + i);
      store(packed + d * tile.count + i, value);
      store(mean + i, load(mean + i) + value);
    }
  for (int64_t i = 0; i < tile.count; i += kLanes) {
    store(mean + i, load(mean + i) * inverse);
    store(rstd + i, Floats{});
  }
  for (int64_t d = 0; d < tile.width; ++d)
    for (int64_t i = 0; i < tile.count; i += kLanes) {
      const Floats off = load(packed + d * tile.count + i) - load(mean + i);
      store(rstd + i, load(rstd + i) + off * off);
    }
  for (int64_t i = 0; i < tile.count; i += kLanes)
    store(rstd + i, 1.0f / root_of(load(rstd + i) * inverse + tile.epsilon));
}

// y = x + SiLU(weight * (c - mean) * rstd + bias)
void norm_forward(const NormTile& tile, const float* c, const float* x, float* y, float* packed, float* mean,
                  float* rstd) {
  norm_statistics(tile, c, packed, mean, rstd);
  for (int64_t d = 0; d < tile.width; ++d)
    for (int64_t i = 0; i < tile.count; i += kLanes) {
      const Floats hat = (load(packed + d * tile.count + i) - load(mean + i)) * load(rstd + i);
      const Floats n = hat * tile.weight[d] + tile.bias[d];
      store(y + d * tile.stride + i, load(x + d * tile.stride + i) + n * sigmoid_of(n));
    }
}

// From the gradient of y that of c; adds those of weight and bias to (width) sums.
void norm_backward(const NormTile& tile, const float* c, const float* grad, const float* mean, const float* rstd,
                   float* c_grad, float* packed, float* weight_grad, float* bias_grad) {
  float* hats = packed;
  float* scaled = packed + tile.width * tile.count;  // the gradient of the normalised values
  float* sums = scaled + tile.width * tile.count;
  float* products = sums + tile.count;
  for (int64_t i = 0; i < tile.count; i += kLanes) {
    store(sums + i, Floats{});
    store(products + i, Floats{});
  }
  for (int64_t d = 0; d < tile.width; ++d) {
    Floats of_weight{}, of_bias{};
    for (int64_t i = 0; i < tile.count; i += kLanes) {
      const Floats hat = (load(c + d * tile.stride + i) - load(mean + i)) * load(rstd + i);
      const Floats n = hat * tile.weight[d] + tile.bias[d], s = sigmoid_of(n);
      const Floats inner = load(grad + d * tile.stride + i) * (s + n * s * (1.0f - s));
      of_weight += inner * hat;
      of_bias += inner;
      const Floats outer = inner * tile.weight[d];
      store(hats + d * tile.count + i, hat);
      store(scaled + d * tile.count + i, outer);
      store(sums + i, load(sums + i) + outer);
      store(products + i, load(products + i) + outer * hat);
    }
    weight_grad[d] += total_of(of_weight);
    bias_grad[d] += total_of(of_bias);
  }
  const float inverse = 1.0f / static_cast<float>(tile.width);
  for (int64_t d = 0; d < tile.width; ++d)
    for (int64_t i = 0; i < tile.count; i += kLanes) {
      const Floats hat = load(hats + d * tile.count + i), outer = load(scaled + d * tile.count + i);
      const Floats rest = (load(sums + i) + hat * load(products + i)) * inverse;
      store(c_grad + d * tile.stride + i, (outer - rest) * load(rstd + i));
    }
}

}  // namespace
}  // namespace pareto
