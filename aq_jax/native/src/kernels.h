// What the kernels of every instruction set offer; the calls of ffi_*.cc find them in a table.
#pragma once

#include <cstdint>

namespace aq {

constexpr int PANEL = 16;  // outputs of a weight that lie side by side

enum class Act : int64_t { none, gelu, gelu_tanh, relu };

// Eight-bit codes of a weight [outputs, inputs] in panels of 16 outputs, as Python prepares them.
struct Weight {
  const uint8_t* codes;  // [panels, steps, 16, 4]: code + 128; a step has four inputs
  const float* grids;    // [panels, groups, 3, 16]: scales, zero points, and sums of a group's codes
  int64_t outputs, inputs, groups;

  int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
  int64_t size() const { return inputs / groups; }             // inputs in a group
  int64_t steps() const { return (size() + 3) / 4; }           // of a group
  const float* grid(int64_t panel, int64_t group) const { return grids + (panel * groups + group) * 3 * PANEL; }
};

// Rows of inputs as 8-bit codes: x ~ scale * code + offset.
struct Inputs {
  const int8_t* codes;  // [rows, inputs]
  const float* scale;   // [rows]
  const float* offset;  // [rows]
};

// What follows a product: y = act(product + bias) + residual, and then (y - mean) / sqrt(var + eps) * gain + shift.
struct After {
  const float* bias;      // [outputs] or null
  Act act;
  const float* residual;  // [rows, outputs] or null
  const float* gain;      // [outputs] or null: no normalization
  const float* shift;     // [outputs]
  float eps;
};

struct Kernels {
  const char* isa;
  // Rotate each row in blocks of so many numbers, unless that is 0, and round it to 256 levels of its range.
  void (*quantize_rows)(const float* x, int64_t rows, int64_t inputs, int64_t block, int8_t* codes, float* scale,
                        float* offset);
  // Compute rows [row, row_end) and panels [panel, panel_end) of a product, without the normalization.
  void (*product)(const Inputs&, const Weight&, const After&, int64_t row, int64_t row_end, int64_t panel,
                  int64_t panel_end, float* y);
  // Normalize rows of y in place.
  void (*normalize)(const After&, int64_t row, int64_t row_end, int64_t outputs, float* y);
  // Compute softmax(q k / sqrt(size)) v of one head of one text; rows lie `width` floats apart.
  void (*attention)(const float* q, const float* k, const float* v, const bool* mask, int64_t tokens, int64_t size,
                    int64_t width, float* out);
};

// The kernels that were compiled, and those of them that this processor runs, best first; null at the end.
const Kernels* const* built();
const Kernels* const* available();

}  // namespace aq
