// Call every kernel of every instruction set that this processor has, over odd sizes, and compare it with plain loops.
// Arrays are as long as they have to be, and no longer: built with sanitizers, the first access beside one stops it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels.h"

using namespace aq;

static uint32_t state = 1;
static float uniform() { return ((state = state * 1664525u + 1013904223u) >> 8) * (2.0f / 16777216) - 1; }

static std::vector<float> numbers(int64_t count) {
  std::vector<float> made(count);
  for (float& x : made) x = uniform();
  return made;
}

static void near(double found, double wanted, double most, const char* what, const char* isa) {
  if (std::fabs(found - wanted) <= most) return;
  std::printf("%s on %s: found %g, wanted %g\n", what, isa, found, wanted);
  std::exit(1);
}

static double activate(Act act, double x) {
  if (act == Act::gelu) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  if (act == Act::gelu_tanh) return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return act == Act::relu ? std::max(x, 0.0) : x;
}

static void product(const Kernels& kernels, int64_t rows, int64_t inputs, int64_t outputs, int64_t groups, Act act) {
  const int64_t size = inputs / groups, steps = (size + 3) / 4, panels = (outputs + PANEL - 1) / PANEL;
  const std::vector<float> x = numbers(rows * inputs);
  std::vector<int8_t> codes(rows * inputs);
  std::vector<float> scale(rows), offset(rows);
  kernels.quantize_rows(x.data(), rows, inputs, 0, codes.data(), scale.data(), offset.data());
  auto rounded = [&](int64_t r, int64_t k) { return double(scale[r]) * codes[r * inputs + k] + offset[r]; };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < inputs; ++k)
      near(rounded(r, k), x[r * inputs + k], 0.51 * scale[r] + 1e-6, "quantize_rows", kernels.isa);

  std::vector<uint8_t> packed(panels * groups * steps * PANEL * 4, 128);
  std::vector<float> grids(panels * groups * 3 * PANEL);
  std::vector<double> weight(outputs * inputs);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t p = o / PANEL, lane = o % PANEL;
      float* grid = &grids[(p * groups + g) * 3 * PANEL + lane];
      grid[0] = 0.01f * (1.1f + uniform()), grid[PANEL] = 5 * uniform();
      for (int64_t k = 0; k < size; ++k) {
        const int code = std::lround(127.5f * uniform() - 0.5f);
        packed[(((p * groups + g) * steps + k / 4) * PANEL + lane) * 4 + k % 4] = uint8_t(code + 128);
        grid[2 * PANEL] += code;
        weight[o * inputs + g * size + k] = double(grid[0]) * (code - double(grid[PANEL]));
      }
    }
  const std::vector<float> bias = numbers(outputs), residual = numbers(rows * outputs), gain = numbers(outputs),
                           shift = numbers(outputs);
  for (bool all : {false, true}) {
    std::vector<float> y(rows * outputs);
    const After after = {all ? bias.data() : nullptr,     all ? act : Act::none, all ? residual.data() : nullptr,
                         all ? gain.data() : nullptr,     shift.data(),          1e-12f};
    const Inputs in = {codes.data(), scale.data(), offset.data()};
    const Weight w = {packed.data(), grids.data(), outputs, inputs, groups};
    kernels.product(in, w, after, 0, rows / 2, 0, panels, y.data());
    kernels.product(in, w, after, rows / 2, rows, 0, panels / 2, y.data());
    kernels.product(in, w, after, rows / 2, rows, panels / 2, panels, y.data());
    std::vector<double> wanted(rows * outputs);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t o = 0; o < outputs; ++o) {
        double& one = wanted[r * outputs + o];
        for (int64_t k = 0; k < inputs; ++k) one += rounded(r, k) * weight[o * inputs + k];
        if (all) one = activate(act, one + bias[o]) + residual[r * outputs + o];
        near(y[r * outputs + o], one, 1e-4 * (1 + std::sqrt(inputs)), "product", kernels.isa);
      }
    if (!all) continue;
    const std::vector<float> before = y;
    kernels.normalize(after, 0, rows, outputs, y.data());
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = &before[r * outputs];
      double mean = 0, variance = 0;
      for (int64_t o = 0; o < outputs; ++o) mean += row[o] / double(outputs);
      for (int64_t o = 0; o < outputs; ++o) variance += (row[o] - mean) * (row[o] - mean) / outputs;
      for (int64_t o = 0; o < outputs && outputs > 1; ++o)
        near(y[r * outputs + o], (row[o] - mean) / std::sqrt(variance + 1e-12) * gain[o] + shift[o], 2e-3, "normalize",
             kernels.isa);
    }
  }
}

static void rotation(const Kernels& kernels, int64_t block) {
  const int64_t rows = 3, inputs = 3 * block;
  const std::vector<float> x = numbers(rows * inputs);
  std::vector<int8_t> codes(rows * inputs);
  std::vector<float> scale(rows), offset(rows);
  kernels.quantize_rows(x.data(), rows, inputs, block, codes.data(), scale.data(), offset.data());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < inputs; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < block; ++i) {
        const bool minus = __builtin_parityll(i & (k % block)) ^ __builtin_parityll(i & (i >> 1));
        sum += (minus ? -1.0 : 1.0) * x[r * inputs + k / block * block + i] / std::sqrt(double(block));
      }
      near(double(scale[r]) * codes[r * inputs + k] + offset[r], sum, 0.51 * scale[r] + 1e-6, "rotation", kernels.isa);
    }
}

static void attention(const Kernels& kernels, int64_t tokens, int64_t size, int64_t heads) {
  const int64_t width = heads * size;
  const std::vector<float> q = numbers(tokens * width), k = numbers(tokens * width), v = numbers(tokens * width);
  std::vector<float> out(tokens * width);
  bool* mask = new bool[tokens];
  for (int64_t t = 0; t < tokens; ++t) mask[t] = t % 3 != 1;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t at = h * size;
    kernels.attention(q.data() + at, k.data() + at, v.data() + at, mask, tokens, size, width, out.data() + at);
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> sum(size);
      double all = 0;
      for (int64_t s = 0; s < tokens; ++s) {
        double score = 0;
        for (int64_t i = 0; i < size; ++i) score += double(q[t * width + at + i]) * k[s * width + at + i];
        const double part = mask[s] ? std::exp(score / std::sqrt(double(size))) : 0;
        all += part;
        for (int64_t i = 0; i < size; ++i) sum[i] += part * v[s * width + at + i];
      }
      for (int64_t i = 0; i < size; ++i) near(out[t * width + at + i], sum[i] / all, 1e-5, "attention", kernels.isa);
    }
  }
  delete[] mask;
}

int main() {
  if (!*available()) return std::puts("this processor has none of the instruction sets"), 2;
  for (const Kernels* const* each = available(); *each; ++each) {
    for (int64_t rows : {0, 1, 7, 33})
      for (int64_t outputs : {1, 16, 35})
        for (int64_t inputs : {1, 48, 66, 161})
          for (int64_t groups : {1, 3})
            if (inputs % groups == 0)
              product(**each, rows, inputs, outputs, groups, Act((rows + outputs + inputs) % 4));
    for (int64_t block : {2, 8, 32, 128}) rotation(**each, block);
    for (int64_t tokens : {1, 7, 16, 33})
      for (int64_t size : {1, 8, 20, 32, 64}) attention(**each, tokens, size, 2);
    std::puts((*each)->isa);
  }
}
