// Call every kernel of every instruction set that this processor has, over odd sizes, and compare it with plain loops.
// Arrays are as long as they have to be, and no longer: built with sanitizers, the first access beside one stops it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
  if (std::fabs(found - wanted) <= most) return;  // which no NaN is
  std::printf("%s on %s: found %g, wanted %g\n", what, isa, found, wanted);
  std::exit(1);
}

static double activate(Act act, double x) {
  if (act == Act::gelu) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  if (act == Act::gelu_tanh) return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  if (act == Act::silu) return x / (1 + std::exp(-x));
  return act == Act::relu ? std::max(x, 0.0) : x;
}

// A weight [outputs, inputs] of random codes, and what it stands for. Bit b of a code lies in the first plane or in the
// second; the step and the byte of the code, and the bits of the plane, tell where in a word.
struct Sample {
  std::vector<uint8_t> packed, small;  // grids that are no floats
  std::vector<float> grids, constants;
  std::vector<double> values;
  std::vector<float> exact;  // as floats compute them
  Weight w;

  Sample(int64_t outputs, int64_t inputs, int64_t groups, int64_t bits, Form form = Form::floats, int64_t parts = 2,
         int64_t sub_bits = 0, int64_t lift = -1, int64_t zero_base = 0)
      : values(outputs * inputs),
        exact(outputs * inputs),
        w{nullptr, nullptr, nullptr, outputs, inputs, groups, bits, 0, 0, form, parts, sub_bits, lift, zero_base} {
    const int64_t size = inputs / groups, main = bits == 8 ? 8 : bits >= 4 ? 4 : 2, rest = bits - main;
    const int64_t steps = 8 / (rest ? rest : main), lines = steps * bits / 8;
    const int64_t chunks = (size + 4 * steps - 1) / (4 * steps);
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    packed.resize(panels * groups * chunks * lines * 4 * PANEL);
    for (uint8_t& byte : packed) byte = uint8_t(127 * uniform());  // where no code is, too
    const bool plain = form == Form::floats;
    grids.resize(panels * parts * groups * PANEL), constants.resize(panels * 2 * PANEL);
    if (!plain) make_small();
    for (int64_t o = 0; o < outputs; ++o) {
      const int64_t p = o / PANEL, lane = o % PANEL;
      // Groups of every third panel share their zero points, so that nobody reads those in the grids; those of the next
      // one do so for some outputs.
      const bool unread = parts == 1 || (p % 3 == 1 && !w.adds());
      const bool shared = unread || (plain && p % 3 == 2 && lane % 2 && !w.adds());
      const float zero = constants[(2 * p + 1) * PANEL + lane] = shared ? 5 * uniform() : NAN;
      for (int64_t g = 0; g < groups; ++g) {
        const float scale = plain ? 0.01f * (1.1f + uniform()) : small_grid(o, g, 0);
        const float offset = shared ? zero : plain ? 5 * uniform() : small_grid(o, g, 1);
        if (plain) grids[number(o, g, 0)] = scale;
        if (plain && parts == 2) grids[number(o, g, 1)] = unread ? NAN : offset;
        double sum = 0;
        for (int64_t k = 0; k < size; ++k) {
          const int64_t half = int64_t(1) << (bits - 1);
          const int64_t code = std::min<int64_t>(2 * half - 1, int64_t((uniform() + 1) * half));
          const int64_t chunk = k / (4 * steps), step = k / 4 % steps, byte = k % 4;
          for (int64_t b = 0; b < bits; ++b) {
            const bool second = b >= main;
            const int64_t wide = second ? rest : main, line = second ? lines - 1 : step / (8 / main);
            const int64_t at = wide * (step % (8 / wide)) + (second ? b - main : b);
            uint8_t& to = packed[((((p * groups + g) * chunks + chunk) * lines + line) * PANEL + lane) * 4 + byte];
            to = uint8_t((to & ~(1 << at)) | (code >> b & 1) << at);
          }
          const int64_t index = o * inputs + g * size + k;
          const float level = float(code - half + (w.adds() ? lift : 0));
          values[index] = w.adds() ? double(scale) * level + offset : double(scale) * (double(level) - offset);
          exact[index] = w.adds() ? level * scale + offset : (level - offset) * scale;
          sum += values[index];
        }
        constants[2 * p * PANEL + lane] += float(sum);
      }
    }
    w.codes = packed.data(), w.constants = constants.data();
    w.grids = plain ? static_cast<const void*>(grids.data()) : small.data();
  }

  // Grids of any bits: halves of less than 1/4, brain floats from 2^-7 to 2^-5.
  void make_small() {
    const int64_t width = w.form == Form::records ? 1 : 2, numbers = w.panels() * w.elements() * w.parts * PANEL;
    small.resize(numbers * width);
    for (uint8_t& byte : small) byte = uint8_t(std::lround(127.5f * uniform() + 127.5f));
    for (int64_t i = 0; i < numbers; ++i) {
      const int64_t element = i / PANEL % w.elements();
      if (w.form == Form::records && element % w.record_bytes() == 1) small[i] &= 0xb3;
      if (w.form == Form::halves) small[2 * i + 1] &= 0xb3;
      if (w.form == Form::brain_floats) small[2 * i + 1] = (small[2 * i + 1] & 0x80) | 0x3c;
    }
  }

  static float half(int bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return float(bits & 0x8000 ? -size : size);
  }

  // Where an element of the grids is.
  int64_t number(int64_t o, int64_t element, int64_t part) const {
    return ((o / PANEL * w.parts + part) * w.elements() + element) * PANEL + o % PANEL;
  }

  // The scale of a group, or its zero point or minimum, byte by byte.
  float small_grid(int64_t o, int64_t group, int64_t part) const {
    if (w.form != Form::records) {
      const int64_t at = 2 * number(o, group, part);
      const int bits = small[at] | small[at + 1] << 8;
      const float base = part ? float(w.zero_base) : 0;
      if (w.form == Form::halves) return half(bits) - base;
      const uint32_t raw = uint32_t(bits) << 16;
      float found;
      std::memcpy(&found, &raw, 4);
      return found - base;
    }
    const int64_t first = group / w.record_groups() * w.record_bytes(), index = group % w.record_groups();
    int integer = 0;
    for (int64_t b = 0; b < w.sub_bits; ++b) {
      const int64_t bit = index * w.sub_bits + b;
      integer |= (small[number(o, first + 2 + bit / 8, part)] >> bit % 8 & 1) << b;
    }
    if (w.sub_bits == 8) integer = int8_t(integer);
    else if (!w.adds()) integer -= 1 << (w.sub_bits - 1);
    const float size = half(small[number(o, first, part)] | small[number(o, first + 1, part)] << 8);
    return (part ? -size : size) * float(integer);
  }

  // Trellis codes: the state of each weight bit by bit.
  Sample(int64_t outputs, int64_t inputs, int64_t step_bits, int64_t step_rows, bool)
      : values(outputs * inputs),
        exact(outputs * inputs),
        w{nullptr, nullptr, nullptr, outputs, inputs, 1, 8, step_bits, step_rows, Form::floats, 1, 0, -1, 0} {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
    grids.resize(panels * PANEL), constants.resize(panels * 2 * PANEL);
    for (int64_t top = 0; top < outputs; top += 256) {
      const int64_t rows = std::min<int64_t>(256, outputs - top), steps = rows / step_rows * inputs;
      const size_t start = packed.size();
      packed.resize(start + (steps * step_bits + 7) / 8);
      for (size_t i = start; i < packed.size(); ++i) packed[i] = uint8_t(std::lround(127.5f * uniform() + 127.5f));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t o = top + r, p = o / PANEL, lane = o % PANEL;
        const float scale = grids[o] = 0.01f * (1.1f + uniform());
        double sum = 0;
        for (int64_t k = 0; k < inputs; ++k) {
          uint32_t number = 0;
          for (int64_t b = 0; b < 12; ++b) {
            const int64_t bit = ((k * (rows / step_rows) + r / step_rows) * step_bits + b) % (steps * step_bits);
            number |= uint32_t(packed[start + bit / 8] >> bit % 8 & 1) << b;
          }
          const uint32_t hash = r % step_rows ? number * 0x6F531C4F + 0x65330338 : number * 0xBD8E8CD7 + 0xED71BC08;
          const int level = int((hash & 255) + (hash >> 8 & 255) + (hash >> 16 & 255) + (hash >> 24)) / 4 - 127;
          values[o * inputs + k] = double(scale) * level, exact[o * inputs + k] = float(level) * scale;
          sum += values[o * inputs + k];
        }
        constants[2 * p * PANEL + lane] = float(sum);
      }
    }
    w.codes = packed.data(), w.grids = grids.data(), w.constants = constants.data();
  }
};

static void product(const Kernels& kernels, int64_t rows, const Sample& matrix, bool floats, Act act) {
  const Weight& w = matrix.w;
  const int64_t inputs = w.inputs, outputs = w.outputs;
  const std::vector<float> x = numbers(rows * inputs);
  std::vector<int8_t> codes(rows * inputs);
  std::vector<float> scale(rows), offset(rows);
  kernels.quantize_rows(x.data(), rows, inputs, 0, codes.data(), scale.data(), offset.data());
  auto rounded = [&](int64_t r, int64_t k) { return double(scale[r]) * codes[r * inputs + k] + offset[r]; };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < inputs; ++k)
      near(rounded(r, k), x[r * inputs + k], 0.51 * scale[r] + 1e-6, "quantize_rows", kernels.isa);

  const int64_t panels = w.panels();
  const std::vector<float> bias = numbers(outputs), residual = numbers(rows * outputs),
                           factor = numbers(rows * outputs), gain = numbers(outputs), shift = numbers(outputs);
  for (bool all : {false, true}) {
    std::vector<float> y(rows * outputs), whole(rows * outputs);
    const After after = {all ? bias.data() : nullptr,   all ? act : Act::none,
                         all ? factor.data() : nullptr, all ? residual.data() : nullptr,
                         all ? gain.data() : nullptr,   shift.data(), 1e-12f};
    const Inputs in = {floats ? x.data() : nullptr, codes.data(), scale.data(), offset.data()};
    kernels.product(in, w, after, 0, rows / 2, 0, panels, y.data());
    kernels.product(in, w, after, rows / 2, rows, 0, panels / 2, y.data());
    kernels.product(in, w, after, rows / 2, rows, panels / 2, panels, y.data());
    kernels.product(in, w, after, 0, rows, 0, panels, whole.data());
    for (int64_t i = 0; i < rows * outputs; ++i) near(y[i], whole[i], 0, "product in parts", kernels.isa);
    std::vector<double> wanted(rows * outputs);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t o = 0; o < outputs; ++o) {
        double& one = wanted[r * outputs + o];
        double most = 1;
        for (int64_t k = 0; k < inputs; ++k) {
          const double value = matrix.values[o * inputs + k];
          one += (floats ? x[r * inputs + k] : rounded(r, k)) * value, most += std::fabs(value);
        }
        if (all) one = activate(act, one + bias[o]) * factor[r * outputs + o] + residual[r * outputs + o];
        near(y[r * outputs + o], one, most * (floats ? 3e-7 : 1e-6), "product", kernels.isa);
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

static void table(const Kernels& kernels, const Sample& matrix) {
  const int64_t inputs = matrix.w.inputs, outputs = matrix.w.outputs;
  const std::vector<int32_t> ids = {int32_t(outputs - 1), 0, int32_t(outputs), -1, int32_t(outputs / 2)};
  std::vector<float> y(ids.size() * inputs);
  kernels.rows(matrix.w, ids.data(), ids.size(), y.data());
  for (size_t i = 0; i < ids.size(); ++i)
    for (int64_t k = 0; k < inputs; ++k) {
      const float found = y[i * inputs + k];
      if (ids[i] >= 0 && ids[i] < outputs)
        near(found, matrix.exact[ids[i] * inputs + k], 0, "rows", kernels.isa);
      else if (found == found)
        near(found, NAN, 0, "rows", kernels.isa);
    }
}

// Two matrices, one after the other.
static void tiles(const Kernels& kernels, int64_t rows, int64_t columns, int64_t step_bits, int64_t step_rows) {
  const Sample first(rows, columns, step_bits, step_rows, true), second(rows, columns, step_bits, step_rows, true);
  std::vector<uint8_t> stream = first.packed;
  stream.insert(stream.end(), second.packed.begin(), second.packed.end());
  std::vector<float> scale(2 * rows), out(2 * rows * columns), part(out.size());
  for (int64_t r = 0; r < 2 * rows; ++r)
    scale[r] = (r < rows ? first : second).grids[r % rows];
  const Tiles in = {stream.data(), rows, columns, step_bits, step_rows};
  if (!in.sound() || 2 * in.matrix_bytes() != int64_t(stream.size())) near(0, 1, 0, "the bytes of tiles", kernels.isa);
  kernels.decode_tiles(in, scale.data(), 0, 1, out.data());
  kernels.decode_tiles(in, scale.data(), 1, 2 * in.panels(), out.data());
  for (int64_t i = 0; i < 2 * rows * columns; ++i)
    near(out[i], (i < rows * columns ? first : second).exact[i % (rows * columns)], 0, "decode_tiles", kernels.isa);
}

static void rotation(const Kernels& kernels, int64_t block) {
  const int64_t rows = 3, inputs = 3 * block;
  const std::vector<float> x = numbers(rows * inputs);
  std::vector<int8_t> codes(rows * inputs);
  std::vector<float> scale(rows), offset(rows);
  kernels.quantize_rows(x.data(), rows, inputs, block, codes.data(), scale.data(), offset.data());
  std::vector<float> rotated(rows * inputs);
  kernels.rotate_rows(x.data(), rows, inputs, block, rotated.data());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < inputs; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < block; ++i) {
        const bool minus = __builtin_parityll(i & (k % block)) ^ __builtin_parityll(i & (i >> 1));
        sum += (minus ? -1.0 : 1.0) * x[r * inputs + k / block * block + i] / std::sqrt(double(block));
      }
      near(double(scale[r]) * codes[r * inputs + k] + offset[r], sum, 0.51 * scale[r] + 1e-6, "rotation", kernels.isa);
      near(rotated[r * inputs + k], sum, 2e-6, "rotate_rows", kernels.isa);
    }
}

static double bound(double score, float cap) { return cap ? cap * std::tanh(score / cap) : score; }

static void attention(const Kernels& kernels, int64_t tokens, int64_t size, int64_t heads, float cap, int64_t reach) {
  const int64_t width = heads * size;
  const std::vector<float> q = numbers(tokens * width), k = numbers(tokens * width), v = numbers(tokens * width);
  std::vector<float> out(tokens * width);
  bool* mask = new bool[tokens];
  for (int64_t t = 0; t < tokens; ++t) mask[t] = t % 3 != 1;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t at = h * size;
    kernels.attention({q.data() + at, k.data() + at, v.data() + at, Stored::float32, nullptr, nullptr, mask, nullptr, 0,
                       tokens, 1, tokens, size, width, width, 0,
                       float(1 / std::sqrt(double(size))), cap, reach, out.data() + at});
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> sum(size);
      double all = 0;
      for (int64_t s = 0; s < tokens; ++s) {
        double score = 0;
        for (int64_t i = 0; i < size; ++i) score += double(q[t * width + at + i]) * k[s * width + at + i];
        const bool near = reach < 0 || std::abs(t - s) <= reach;
        const double part = mask[s] && near ? std::exp(bound(score / std::sqrt(double(size)), cap)) : 0;
        all += part;
        for (int64_t i = 0; i < size; ++i) sum[i] += part * v[s * width + at + i];
      }
      for (int64_t i = 0; i < size; ++i)
        near(out[t * width + at + i], all ? sum[i] / all : 0, 1e-5, "attention", kernels.isa);
    }
  }
  delete[] mask;
}

static void cached_attention(const Kernels& kernels, int64_t tokens, int64_t keys, int64_t size, int64_t shared,
                             float cap, int64_t reach) {
  const int64_t kv = 2, heads = kv * shared;
  const std::vector<float> q = numbers(tokens * heads * size), k = numbers(keys * kv * size),
                           v = numbers(keys * kv * size);
  std::vector<float> out(tokens * heads * size);
  std::vector<int32_t> positions(tokens);
  for (int64_t t = 0; t < tokens; ++t) positions[t] = keys - tokens + t;
  for (int64_t h = 0; h < kv; ++h) {
    const int64_t from = h * shared * size;
    kernels.attention({q.data() + from, k.data() + h * size, v.data() + h * size, Stored::float32, nullptr, nullptr,
                       nullptr, positions.data(), 0, tokens, shared, keys, size, heads * size, kv * size, 0,
                       float(1 / std::sqrt(double(size))), cap, reach,
                       out.data() + from});
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = (t * heads + head) * size, h = head / shared;
      std::vector<double> sum(size);
      double all = 0;
      for (int64_t s = reach < 0 ? 0 : std::max<int64_t>(0, positions[t] - reach); s <= positions[t]; ++s) {
        double score = 0;
        for (int64_t i = 0; i < size; ++i) score += double(q[at + i]) * k[(s * kv + h) * size + i];
        const double part = std::exp(bound(score / std::sqrt(double(size)), cap));
        all += part;
        for (int64_t i = 0; i < size; ++i) sum[i] += part * v[(s * kv + h) * size + i];
      }
      for (int64_t i = 0; i < size; ++i) near(out[at + i], sum[i] / all, 1e-5, "cached attention", kernels.isa);
    }
}

// Codes of a stream, bit by bit.
static int code_of(const std::vector<uint8_t>& stream, int bits, int64_t i) {
  if (bits == 8) return int8_t(stream[i]);
  int code = 0;
  for (int b = 0; b < bits; ++b) code |= (stream[(i * bits + b) / 8] >> (i * bits + b) % 8 & 1) << b;
  return code - (1 << (bits - 1));
}

static void dequantize(const Kernels& kernels, int bits, int64_t count, int64_t group) {
  std::vector<uint8_t> stream((count * bits + 7) / 8);
  for (uint8_t& byte : stream) byte = uint8_t(std::lround(127.5f * uniform() + 127.5f));
  const std::vector<float> scale = numbers((count + group - 1) / group), zero = numbers((count + group - 1) / group);
  std::vector<float> out(count);
  const std::vector<float> minimum = numbers(scale.size());
  const bool lifted = count % 2;
  const Codes in = {stream.data(),   int64_t(stream.size()),             bits, scale.data(),
                    zero.data(), lifted ? minimum.data() : nullptr, group};
  kernels.dequantize(in, 0, count / 3, out.data());
  kernels.dequantize(in, count / 3, count, out.data() + count / 3);
  for (int64_t i = 0; i < count; ++i)
    near(out[i], (code_of(stream, bits, i) - zero[i / group]) * scale[i / group] + (lifted ? minimum[i / group] : 0), 0,
         "dequantize", kernels.isa);
}

static void quantize(const Kernels& kernels, int bits, int64_t count, int64_t group, Method method, bool halves) {
  std::vector<float> w = numbers(count);
  std::vector<uint16_t> half(count);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t raw;
    std::memcpy(&raw, &w[i], 4);
    half[i] = uint16_t(raw >> 16), raw &= 0xffff0000;
    if (halves) std::memcpy(&w[i], &raw, 4);
  }
  const int64_t groups = (count + group - 1) / group;
  const bool packed = bits < 8 && (group * bits % 8 == 0 || groups == 1);
  std::vector<uint8_t> codes(packed ? (count * bits + 7) / 8 : count);
  std::vector<float> scale(groups), zero(groups);
  std::vector<double> sums(3 * groups);
  const float starts[] = {1, 0.9f, 0.8f};
  const Groups in = {halves ? nullptr : w.data(), halves ? half.data() : nullptr, count, group, bits, method,
                     {starts, 3, 4}, packed, codes.data(), scale.data(), zero.data(), sums.data()};
  kernels.quantize(in, 0, groups / 3);
  kernels.quantize(in, groups / 3, groups);
  for (int64_t g = 0; g < groups; ++g) {
    double square = 0, cross = 0, error = 0;
    for (int64_t i = g * group; i < std::min(count, (g + 1) * group); ++i) {
      const int code = packed ? code_of(codes, bits, i) : int8_t(codes[i]);
      const float value = (code - zero[g]) * scale[g];
      const double d = double(w[i]) - value;
      square += double(w[i]) * w[i], cross += w[i] * d, error += d * d;
      if (method <= Method::minmax) near(d, 0, 0.501 * scale[g], "quantize", kernels.isa);
    }
    near(sums[3 * g], square, 1e-5 * square, "w.w", kernels.isa);
    near(sums[3 * g + 1], cross, 1e-5 * (std::sqrt(square * error) + 1e-10), "w.d", kernels.isa);
    near(sums[3 * g + 2], error, 1e-5 * error + 1e-10, "d.d", kernels.isa);
  }
}

int main() {
  if (!*available()) return std::puts("this processor has none of the instruction sets"), 2;
  for (const Kernels* const* each = available(); *each; ++each) {
    int64_t count = 0;
    for (int64_t bits : {2, 3, 4, 5, 6, 8})
      for (int64_t inputs : {1, 48, 66, 321})
        for (int64_t groups : {1, 3}) {
          if (inputs % groups) continue;
          table(**each, Sample(19, inputs, groups, bits));
          for (int64_t rows : {0, 1, 4, 7, 33})
            for (int64_t outputs : {1, 16, 35, 83})
              if (outputs != 83 || inputs == 321)
                for (bool floats : {false, true}) {
                  const Act act = Act(count++ % 5);
                  const Sample matrix(outputs, inputs, groups, bits, Form::floats, 1 + count / 2 % 2);
                  product(**each, rows, matrix, floats, act);
                }
        }
    auto small = [&](int64_t inputs, int64_t groups, int64_t bits, Form form, int64_t parts, int64_t sub_bits,
                     int64_t lift, int64_t zero_base = 0) {
      for (int64_t outputs : {19, 83}) {
        const Sample matrix(outputs, inputs, groups, bits, form, parts, sub_bits, lift, zero_base);
        table(**each, matrix);
        for (int64_t rows : {1, 7})
          for (bool floats : {false, true}) product(**each, rows, matrix, floats, Act(count++ % 5));
      }
    };
    for (int64_t bits : {3, 4, 8})
      for (int64_t groups : {1, 3, 22})
        for (Form form : {Form::halves, Form::brain_floats}) {
          small(66, groups, bits, form, 1, 0, -1);
          small(66, groups, bits, form, 2, 0, -1);
          small(66, groups, bits, form, 2, 0, 0);
          small(66, groups, bits, form, 2, 0, int64_t(1) << (bits - 1));
          small(66, groups, bits, form, 2, 0, -1, int64_t(1) << (bits - 1));
        }
    for (int64_t records : {1, 3}) {
      small(256 * records, 16 * records, 2, Form::records, 2, 4, 2);
      small(256 * records, 16 * records, 4, Form::records, 1, 6, -1);  // codes of 3 bits
      small(256 * records, 8 * records, 5, Form::records, 2, 6, 16);
      small(256 * records, 16 * records, 6, Form::records, 1, 8, -1);
    }
    for (int64_t step_bits : {2, 3, 4, 5})
      for (int64_t step_rows : {1, 2})
        for (int64_t inputs : {1, 7, 50, 150})
          for (int64_t outputs : {1, 2, 16, 90, 258, 300}) {
            if (!Tiles{nullptr, outputs, inputs, step_bits, step_rows}.sound()) continue;
            tiles(**each, outputs, inputs, step_bits, step_rows);
            const Sample matrix(outputs, inputs, step_bits, step_rows, true);
            table(**each, matrix);
            for (int64_t rows : {1, 7})
              for (bool floats : {false, true}) product(**each, rows, matrix, floats, Act(count++ % 5));
          }
    for (int64_t block : {2, 8, 32, 128}) rotation(**each, block);
    for (int64_t tokens : {1, 7, 16, 33})
      for (int64_t size : {1, 8, 20, 32, 64}) {
        attention(**each, tokens, size, 2, 0, -1);
        attention(**each, tokens, size, 2, 1.5f, 3);
      }
    for (int64_t tokens : {1, 3, 17})
      for (int64_t size : {2, 20, 32, 64})
        for (int64_t shared : {1, 4}) {
          cached_attention(**each, tokens, tokens + 15, size, shared, 0, -1);
          cached_attention(**each, tokens, tokens + 35, size, shared, 1.5f, 3);
        }
    for (int bits = 2; bits <= 8; ++bits)
      for (int64_t count : {1, 7, 64, 200, 333, 9001})
        for (int64_t group : {1, 8, 13, 100, 5000}) {
          dequantize(**each, bits, count, group);
          for (int method = 0; method < 5; ++method)
            quantize(**each, bits, count, group, Method(method), (count + group + method) % 2);
        }
    std::puts((*each)->isa);
  }
}
