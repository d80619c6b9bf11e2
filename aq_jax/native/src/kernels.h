// What the kernels of every instruction set offer; the calls of ffi_*.cc find them in a table.
#pragma once

#include <cstdint>

namespace aq {

constexpr int PANEL = 16;  // outputs of a weight that lie side by side

enum class Act : int64_t { none, gelu, gelu_tanh, relu, silu };

// Matrices of trellis codes, as the format has them (docs/format.md): tiles of 256 rows, each column by column.
struct Tiles {
  const uint8_t* stream;
  int64_t rows, columns;        // of a matrix
  int64_t step_bits, step_rows; // of a step: its new bits, and the weights that it is for, one below the other

  static constexpr int64_t ROWS = 256;

  // Of a tile of so many rows.
  int64_t bits(int64_t tile_rows) const { return tile_rows / step_rows * columns * step_bits; }
  int64_t bytes(int64_t tile_rows) const { return (bits(tile_rows) + 7) / 8; }
  int64_t matrix_bytes() const { return rows / ROWS * bytes(ROWS) + bytes(rows % ROWS); }
  int64_t panels() const { return (rows + PANEL - 1) / PANEL; }  // of a matrix
  // Whether a reader can begin: whole steps, and a state in each tile.
  bool sound() const {
    const bool known = step_rows == 1 ? step_bits >= 2 && step_bits <= 5 : step_rows == 2 && step_bits == 3;
    if (!known || rows <= 0 || columns <= 0 || rows % step_rows) return false;
    return bits(rows % ROWS ? rows % ROWS : ROWS) >= 12;
  }
};

// What the numbers of a weight's grids are: those of records are bytes.
enum class Form : int64_t { floats, halves, brain_floats, records };

// Codes of a weight [outputs, inputs] in panels of 16 outputs, as Python prepares them (ops/native_panels.py). A code q
// of a group stands for (q - zero) * scale, or, if `lift` is not negative, for (q + lift) * scale + minimum.
struct Weight {
  const uint8_t* codes;    // [panels, lines, 16, 4]: code + 2^(bits - 1), in planes of bits; see codes.h
  const void* grids;       // [panels, parts, elements, 16]: scales, and zero points or minimums; see grids_of.h
  const float* constants;  // [panels, 2, 16]: the sum of an output's weights; its groups' zero point, NaN if several
  int64_t outputs, inputs, groups, bits;
  // Of trellis codes, which lie in `codes` as the format has them, and are levels of 8 bits; otherwise 0.
  int64_t step_bits, step_rows;
  Form form;
  int64_t parts;     // 1: scales alone
  int64_t sub_bits;  // of an integer of a record
  int64_t lift;
  int64_t zero_base;  // halves: what the zero points of signed codes are less

  int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
  int64_t size() const { return inputs / groups; }  // inputs in a group
  // Codes of a chunk, the fewest that fill whole lines of 64 bytes for 16 outputs; groups have whole chunks.
  int64_t chunk() const { return bits == 8 ? 4 : bits == 4 ? 8 : bits % 2 ? 32 : 16; }
  int64_t padded() const { return (size() + chunk() - 1) / chunk() * chunk(); }  // codes of a group
  int64_t lines() const { return padded() * bits / 32; }                         // of a group
  int64_t bytes() const { return groups * lines() * 4 * PANEL; }                 // of a panel
  Tiles tiles() const { return {codes, outputs, inputs, step_bits, step_rows}; }
  // Inputs, groups and bytes of a record.
  static constexpr int64_t RECORD = 256;
  int64_t record_groups() const { return RECORD / size(); }
  int64_t record_bytes() const { return 2 + record_groups() * sub_bits / 8; }
  int64_t elements() const { return form == Form::records ? inputs / RECORD * record_bytes() : groups; }  // of a row
  bool adds() const { return lift >= 0; }
  int64_t element_bytes() const { return form == Form::records ? 1 : form == Form::floats ? 4 : 2; }
  // An element of 16 outputs.
  template <class T>
  const T* grid(int64_t panel, int64_t part, int64_t element) const {
    const int64_t at = ((panel * parts + part) * elements() + element) * PANEL * element_bytes();
    return reinterpret_cast<const T*>(static_cast<const char*>(grids) + at);
  }
  const float* sums(int64_t output) const { return constants + output / PANEL * 2 * PANEL + output % PANEL; }
  const float* shared_zeros(int64_t panel) const { return constants + (2 * panel + 1) * PANEL; }
  bool shares_zeros(int64_t panel) const {
    const float* zeros = shared_zeros(panel);
    bool all = !adds();
    for (int i = 0; i < PANEL; ++i) all &= zeros[i] == zeros[i];
    return parts == 1 || all;
  }
};

// Rows of inputs: floats, or else 8-bit codes: x ~ scale * code + offset.
struct Inputs {
  const float* floats;  // [rows, inputs] or null
  const int8_t* codes;  // [rows, inputs]
  const float* scale;   // [rows]
  const float* offset;  // [rows]
};

// What follows a product: y = act(product + bias) * factor + residual, and then
// (y - mean) / sqrt(var + eps) * gain + shift.
struct After {
  const float* bias;      // [outputs] or null
  Act act;
  const float* factor;    // [rows, outputs] or null
  const float* residual;  // [rows, outputs] or null
  const float* gain;      // [outputs] or null: no normalization
  const float* shift;     // [outputs]
  float eps;
};

// How keys and values are stored: as numbers, or as codes that a scale a token and head multiplies.
enum class Stored : int64_t { float32, bfloat16, int8 };

// One head of the keys and values of a text, and the queries that see them: of each token, `shared` that lie together.
struct Heads {
  const float* q;
  const void *k, *v;
  Stored stored;
  const float *k_scale, *v_scale;  // of codes
  const bool* mask;          // [keys]: which keys are seen; null for all
  const int32_t* positions;  // [tokens]: a token sees no key after its own position; null if it sees all
  int64_t first;             // the position of the first of these keys
  int64_t tokens, shared, keys, size;
  int64_t q_width, k_width, scale_width;  // numbers from one token to the next
  float scale;               // of products
  float cap;                 // scores are cap tanh(score / cap), unless this is 0
  int64_t reach;             // a token sees no key that is further away; below 0, it sees any
  float* out;                // as q
};

// Codes of a tensor as the format's bit stream; with 8 bits, signed bytes. `group` elements share a grid.
struct Codes {
  const uint8_t* stream;
  int64_t bytes;
  int bits;
  const float* scale;  // [groups]
  const float* zero;     // [groups] or null: zeros
  const float* minimum;  // [groups] or null: what is added to (code - zero) * scale
  int64_t group;
};

// How grids are chosen: from the range of a group, or by a search for the smallest squared error.
enum class Method : int64_t { absmax, minmax, mid_tread, mid_rise, affine };

constexpr int MAX_STARTS = 16;

// A search from several starts, which are fractions of a group's range, in so many rounds.
struct Search {
  const float* starts;
  int64_t count, rounds;
};

// Weights in groups, of which the last may be short, and what they become.
struct Groups {
  const float* floats;
  const uint16_t* halves;  // bfloat16, instead of floats; or null
  int64_t count, group;
  int bits;
  Method method;
  Search search;
  bool packed;    // codes as the format's bit stream, for groups of whole bytes; otherwise a signed byte each
  uint8_t* codes;
  float* scale;   // [groups]
  float* zero;    // [groups]
  double* sums;   // [groups, 3] or null: w.w, w.d and d.d, d being the error
};

// A matrix that becomes trellis codes, in tiles of rows that make whole bytes.
struct Matrix {
  const float* w;        // [rows, columns]
  int64_t rows, columns, tile_rows;
  int bits, values;      // of a step: its bits, and the rows that it gives a value to
  const int8_t* levels;  // [values, 4096]
  const float* h;        // [columns, columns] or null: what errors weigh, and the factor u of h^-1 = u^T u
  const float* u;
  float start;           // the first scale of a row, over the root of its mean square
  int64_t rounds;        // of refinement
  uint8_t* data;         // one bit stream a tile
  float* scale;          // [rows]
  double* sums;          // [tiles, 3]: w.w, w.d and d.d, d being the error
};

// What `quantize` and `trellis` return: bits.
constexpr int UNSOUND = 1;  // an element is not finite, or a scale is out of bounds
constexpr int ZEROS = 2;    // a group looks like zeros

struct Kernels {
  const char* isa;
  // Rotate each row in blocks of so many numbers, unless that is 0, and round it to 256 levels of its range.
  void (*quantize_rows)(const float* x, int64_t rows, int64_t inputs, int64_t block, int8_t* codes, float* scale,
                        float* offset);
  // Rotate each row in blocks of so many numbers.
  void (*rotate_rows)(const float* x, int64_t rows, int64_t inputs, int64_t block, float* y);
  // Compute rows [row, row_end) and panels [panel, panel_end) of a product, without the normalization.
  void (*product)(const Inputs&, const Weight&, const After&, int64_t row, int64_t row_end, int64_t panel,
                  int64_t panel_end, float* y);
  // Look up rows of a weight by number: [count, inputs]; NaN for a number that is none.
  void (*rows)(const Weight&, const int32_t* ids, int64_t count, float* y);
  // Normalize rows of y in place.
  void (*normalize)(const After&, int64_t row, int64_t row_end, int64_t outputs, float* y);
  // Compute softmax(scale q k) v.
  void (*attention)(const Heads&);
  // Decode elements [first, last) of a tensor.
  void (*dequantize)(const Codes&, int64_t first, int64_t last, float* out);
  // Quantize groups [first, last).
  int (*quantize)(const Groups&, int64_t first, int64_t last);
  // Encode tiles [first, last) of a matrix.
  int (*trellis)(const Matrix&, int64_t first, int64_t last);
  // Decode panels [first, last) of matrices of trellis codes, with a scale for each row.
  void (*decode_tiles)(const Tiles&, const float* scale, int64_t first, int64_t last, float* out);
};

// The kernels that were compiled, and those of them that this processor runs, best first; null at the end.
const Kernels* const* built();
const Kernels* const* available();

}  // namespace aq
