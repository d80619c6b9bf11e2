// Trellis codes of a matrix, tile by tile: a first pass column by column, and rounds that refine it.
//
// In the first pass the error of a column is made up for by the columns that follow (GPTQ), so that a column's codes
// are chosen when all before it are known. The path goes on for LOOKAHEAD rows into what follows, and those choices are
// dropped: without them the last states of a column would be chosen as if nothing depended on them.
//
// A round then fits the scales by least squares, and finds the path of every window of a column's length again, given
// all others; windows lie across two columns in every other round. No step of it makes the error larger.
//
// What a tile gets depends on nothing but its elements, in whichever thread it is computed.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kernels.h"
#include "grids.h"
#include "trellis_search.h"

namespace aq {
namespace AQ_ISA {
namespace {

constexpr int64_t LOOKAHEAD = 16;  // rows
constexpr int64_t BLOCK = 64;      // columns that wait until their errors reach all others, in one product
constexpr int WIDE = 4;            // vectors of rows, and columns, that are in registers
constexpr int64_t ROWS = 64;       // of all columns of a tile in memory: a multiple of this
static_assert(ROWS % (WIDE * LANES) == 0);
constexpr float LEAST_WEIGHT = 0x1p-20f;
constexpr float NO_SCALE = 0x1p-100f;  // of rows of zeros: their values are none that matter

using Floats = std::vector<float>;

// to[k] += factor * (sum over c of a[c][k] b[c]), for k in [first, last) and `count` columns b of `rows` numbers; of
// these, rows [row, end), which are multiples of ROWS.
void add_products(float factor, const float* a, int64_t stride, const float* b, int64_t count, int64_t first,
                  int64_t last, int64_t rows, int64_t row, int64_t end, float* to) {
  for (int64_t k = first; k < last; k += WIDE) {
    const int64_t here = std::min<int64_t>(WIDE, last - k);
    for (int64_t r = row; r < end; r += WIDE * LANES) {
      F sums[WIDE][WIDE] = {};
      for (int64_t c = 0; c < count; ++c) {
        F v[WIDE];
        for (int i = 0; i < WIDE; ++i) v[i] = load<F>(b + c * rows + r + i * LANES);
        for (int j = 0; j < WIDE; ++j) {
          const F weight = splat(a[c * stride + k + (j < here ? j : 0)]);
          for (int i = 0; i < WIDE; ++i) sums[j][i] = fma(weight, v[i], sums[j][i]);
        }
      }
      for (int j = 0; j < here; ++j)
        for (int i = 0; i < WIDE; ++i) {
          float* at = to + (k + j) * rows + r + i * LANES;
          store(at, fma(splat(factor), sums[j][i], load<F>(at)));
        }
    }
  }
}

float stored(double scale) {
  const float one = float(std::min(std::max(scale, double(SCALE_MIN)), double(SCALE_MAX)));
  return round_mantissa(splat(one), 7)[0];
}

template <int BITS, int VALUES>
class Tile {
  using Code = Trellis<BITS, VALUES>;

 public:
  Tile(const Code& code, const Matrix& in, int64_t first_row)
      : code_(code),
        in_(in),
        first_(first_row),
        rows_(std::min<int64_t>(in.tile_rows, in.rows - first_row)),
        columns_(in.columns),
        padded_((rows_ + ROWS - 1) / ROWS * ROWS),
        each_(rows_ / VALUES),
        count_(each_ * columns_),
        wide_(std::min(columns_, (LOOKAHEAD + each_ - 1) / each_)),
        w_(columns_ * padded_),
        v_(columns_ * padded_),
        unit_(rows_),
        scale_(rows_),
        states_(count_),
        steps_(2 * wide_ * each_ + LOOKAHEAD),
        found_(steps_.size()),
        costs_((steps_.size() + 1) * Code::ENDS) {}

  int encode(uint8_t* data, float* scale, double* sums) {
    read();
    follow_columns();
    if (in_.h) {
      wanted_.assign(w_.size(), 0.0f);
      made_.assign(w_.size(), 0.0f);
      add_products(1, in_.h, columns_, w_.data(), columns_, 0, columns_, padded_, 0, padded_,
                   wanted_.data());
      add_products(1, in_.h, columns_, v_.data(), columns_, 0, columns_, padded_, 0, padded_,
                   made_.data());
    }
    fit_scales();
    for (int64_t round = 0; round < in_.rounds && (!in_.h || wide_ == 1); ++round) {
      find_windows(round % 2 == 0 ? half() : 0);
      fit_scales();
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const double whole = double(scale_[r]) * unit_[r];
      if (unit_[r] > 0 && !(whole > SCALE_MIN && whole < SCALE_MAX)) flags_ |= UNSOUND;
      scale[r] = unit_[r] > 0 ? stored(whole) : NO_SCALE;
    }
    write(data);
    add_up(scale, sums);
    return flags_;
  }

 private:
  // Rows become columns, of a unit in which the largest number is around 1.
  void read() {
    for (int64_t r = 0; r < rows_; ++r) {
      const float* row = in_.w + (first_ + r) * columns_;
      float largest = 0;
      for (int64_t c = 0; c < columns_; ++c) {
        const float size = std::fabs(row[c]);
        if (size <= FLOAT_MAX) largest = std::max(largest, size);
        else flags_ |= UNSOUND;
      }
      if (largest == 0 || largest < SCALE_MIN) flags_ |= ZEROS;
      unit_[r] = largest < SCALE_MIN ? 0 : round_mantissa(splat(std::min(largest, SCALE_MAX)), 0)[0];
      const float factor = unit_[r] > 0 ? 1 / unit_[r] : 0;
      double squares = 0;
      for (int64_t c = 0; c < columns_; ++c) {
        const float x = row[c] == row[c] ? std::min(std::max(row[c], -largest), largest) * factor : 0;
        w_[c * padded_ + r] = x;
        squares += double(x) * x;
      }
      scale_[r] = stored(in_.start * std::sqrt(squares / double(columns_)));
      if (!(scale_[r] > NO_SCALE)) scale_[r] = NO_SCALE;
    }
    weigh_rows();
  }

  // What an error of one level in each row weighs.
  void weigh_rows() {
    weights_.resize(rows_);
    inverse_.resize(rows_);
    double most = 0;
    auto weight = [&](int64_t r) {
      const double scale = double(scale_[r]) * unit_[r];
      return scale * scale;
    };
    for (int64_t r = 0; r < rows_; ++r) most = std::max(most, weight(r));
    for (int64_t r = 0; r < rows_; ++r) {
      weights_[r] = most > 0 ? std::max(LEAST_WEIGHT, float(weight(r) / most)) : 1;
      inverse_[r] = 1 / scale_[r];
    }
  }

  // About half a window, in steps; of a column, a multiple of ROWS if it has them.
  int64_t half() const {
    const int64_t rows = columns_ == 1 ? 0 : wide_ * rows_ / 2;
    return (rows < ROWS ? rows : rows / ROWS * ROWS) / VALUES;
  }

  int64_t column_of(int64_t e) const { return e / each_; }
  int64_t row_of(int64_t e) const { return e % each_ * VALUES; }

  // Set step i of the search to step e of the tile, its targets being given.
  template <class Target, class ColumnWeight>
  void set_steps(int64_t e, int64_t count, const Target& target, const ColumnWeight& column_weight) {
    float weight = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (e + i) % count_, c = column_of(at), r = row_of(at);
      Step& step = steps_[i];
      const float own = weights_[r] * column_weight(c);
      if (i) steps_[i - 1].ratio = std::min(std::max(weight / own, 0x1p-30f), 0x1p30f);
      weight = own;
      step.ratio = 1;
      step.second = VALUES == 2 ? std::min(std::max(weights_[r + VALUES - 1] / weights_[r], 0x1p-20f), 0x1p20f) : 0;
      for (int v = 0; v < VALUES; ++v) step.x[v] = target(c, r + v);
    }
  }

  void keep(int64_t e, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (e + i) % count_, c = column_of(at), r = row_of(at);
      states_[at] = found_[i];
      for (int v = 0; v < VALUES; ++v) v_[c * padded_ + r + v] = code_.levels[v][found_[i]];
    }
  }

  void follow_columns() {
    Floats left(w_), errors(in_.u ? std::min(columns_, BLOCK + 2 * wide_) * padded_ : 0);
    int64_t block = 0;  // the first column whose errors have not reached all others
    for (int64_t c = 0; c < columns_;) {
      const int64_t next = columns_ - c < 2 * wide_ ? columns_ : c + wide_;
      const int64_t e = c * each_, count = (next - c) * each_;
      const bool end = next == columns_;
      const int64_t ahead = end ? 0 : std::min(LOOKAHEAD / VALUES, count_ - e - count);
      auto target = [&](int64_t k, int64_t r) { return left[k * padded_ + r] * inverse_[r]; };
      auto column_weight = [&](int64_t k) {
        if (!in_.u) return 1.0f;
        const float diagonal = in_.u[k * columns_ + k];
        return 1 / (diagonal * diagonal);
      };
      set_steps(e, count + ahead, target, column_weight);
      const int first = c ? states_[e - 1] >> BITS : -1;
      int last = end && c ? states_[0] & (Code::ENDS - 1) : -1;  // the tile is a ring
      code_.find(steps_.data(), count + ahead, first, last, costs_.data(), found_.data());
      if (end && !c) {
        last = found_[count - 1] >> BITS;
        code_.find(steps_.data(), count, last, last, costs_.data(), found_.data());
      }
      keep(e, count);
      if (in_.u) {
        const int64_t near = std::min(columns_, block + BLOCK + 3 * wide_);
        for (; c < next; ++c) {
          float* error = errors.data() + (c - block) * padded_;
          const float diagonal = 1 / in_.u[c * columns_ + c];
          for (int64_t r = 0; r < rows_; ++r)
            error[r] = (left[c * padded_ + r] - v_[c * padded_ + r] * scale_[r]) * diagonal;
          // The columns that are looked at before the block is done; then all others.
          add_products(-1, in_.u + c * columns_, columns_, error, 1, c + 1, near, padded_, 0, padded_,
                       left.data());
        }
        if (next - block >= BLOCK) {
          add_products(-1, in_.u + block * columns_, columns_, errors.data(), next - block,
                       near, columns_, padded_, 0, padded_, left.data());
          block = next;
        }
      }
      c = next;
    }
  }

  // The best scale of each row, given its codes.
  void fit_scales() {
    for (int64_t r = 0; r < rows_; ++r) {
      double with = 0, own = 0;
      for (int64_t c = 0; c < columns_; ++c) {
        const int64_t at = c * padded_ + r;
        with += double(v_[at]) * (in_.h ? wanted_[at] : w_[at]);
        own += double(v_[at]) * (in_.h ? made_[at] : v_[at]);
      }
      if (with > 0 && own > 0) scale_[r] = stored(with / own);
    }
    weigh_rows();
  }

  // Find windows of a column's length again, given all others; each begins `offset` steps into a column.
  void find_windows(int64_t offset) {
    const int64_t size = wide_ * each_, turn = offset * VALUES;  // the row at which a window begins
    Floats changes(in_.h ? (BLOCK + 1) * padded_ : 0), own(in_.h ? padded_ : 0), others(own);
    int64_t block = 0;  // the first column whose changes have not reached all others
    auto target = [&](int64_t c, int64_t r) {
      const int64_t at = c * padded_ + r;
      if (!in_.h) return w_[at] * inverse_[r];
      return v_[at] + (wanted_[at] * inverse_[r] - made_[at]) / in_.h[c * columns_ + c];
    };
    auto column_weight = [&](int64_t c) { return in_.h ? in_.h[c * columns_ + c] : 1.0f; };
    auto near = [&] { return std::min(columns_, block + BLOCK + 2); };
    auto add = [&](int64_t c, const float* of, int64_t count, int64_t first, int64_t last, int64_t row, int64_t end) {
      add_products(1, in_.h + c * columns_, columns_, of, count, first, last, padded_, row, end, made_.data());
    };
    auto spread = [&](int64_t next) {
      const int64_t count = std::min(next - block + 1, columns_ - block);
      add(block, changes.data(), count, 0, block, 0, padded_);
      add(block, changes.data(), count, near(), columns_, 0, padded_);
      std::fill(changes.begin(), changes.end(), 0.0f);
      block = next;
    };
    for (int64_t start = 0; start < count_; start += size) {
      const int64_t e = start + offset, count = std::min(size, count_ - start), c = start / size;
      if (in_.h && offset && c == columns_ - 1) spread(c);  // it reaches column 0
      set_steps(e, count, target, column_weight);
      const int first = states_[(e + count_ - 1) % count_] >> BITS;
      const int last = states_[(e + count) % count_] & (Code::ENDS - 1);
      code_.find(steps_.data(), count, first, last, costs_.data(), found_.data());
      if (in_.h) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = (e + i) % count_, k = column_of(at), r = row_of(at);
          for (int v = 0; v < VALUES; ++v)
            (k == c ? own : others)[r + v] = code_.levels[v][found_[i]] - v_[k * padded_ + r + v];
        }
        const int64_t other = (c + 1) % columns_;
        float* const to = changes.data() + (c - block) * padded_;
        for (int64_t r = turn; r < rows_; ++r) to[r] += own[r];
        for (int64_t r = 0; other && r < turn; ++r) to[padded_ + r] += others[r];
        add(c, own.data(), 1, block, near(), turn / ROWS * ROWS, padded_);
        add(other, others.data(), 1, other ? block : 0, other ? near() : columns_, 0, (turn + ROWS - 1) / ROWS * ROWS);
      }
      keep(e, count);
      if (in_.h && c + 1 - block == BLOCK) spread(c + 1);
    }
    if (in_.h && block < columns_) spread(columns_);
  }

  void write(uint8_t* data) const {
    const int64_t bits = count_ * BITS, bytes = (bits + 7) / 8;
    std::fill(data, data + bytes, uint8_t(0));
    for (int64_t e = 0; e < count_; ++e)
      for (int i = 0; i < BITS; ++i) {
        const int64_t at = (e * BITS + STATE_BITS - BITS + i) % bits;
        data[at / 8] |= uint8_t((states_[e] >> (STATE_BITS - BITS + i) & 1) << (at % 8));
      }
  }

  void add_up(const float* scale, double* sums) const {
    sums[0] = sums[1] = sums[2] = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      double ww = 0, wd = 0, dd = 0;
      for (int64_t c = 0; c < columns_; ++c) {
        const double w = double(w_[c * padded_ + r]) * unit_[r];
        const double d = w - double(v_[c * padded_ + r]) * scale[r];
        ww += w * w, wd += w * d, dd += d * d;
      }
      sums[0] += ww, sums[1] += wd, sums[2] += dd;
    }
  }

  const Code& code_;
  const Matrix& in_;
  const int64_t first_, rows_, columns_, padded_, each_, count_, wide_;  // each_: steps of a column
  Floats w_, v_;             // [columns, rows]: weights in their row's unit, levels
  Floats wanted_, made_;     // both times the Hessian
  Floats unit_, scale_, weights_, inverse_;
  std::vector<uint16_t> states_;
  std::vector<Step> steps_;
  std::vector<uint16_t> found_;
  Floats costs_;
  int flags_ = 0;
};

template <int BITS, int VALUES>
int encode(const Matrix& in, int64_t first, int64_t last) {
  const auto code = std::make_unique<const Trellis<BITS, VALUES>>(in.levels);
  int flags = 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = i * in.tile_rows;
    Tile<BITS, VALUES> tile(*code, in, row);
    flags |= tile.encode(in.data + row * in.columns / VALUES * BITS / 8, in.scale + row, in.sums + 3 * i);
  }
  return flags;
}

}  // namespace

int trellis(const Matrix& in, int64_t first, int64_t last) {
  if (in.values == 2) return encode<3, 2>(in, first, last);
  switch (in.bits) {
    case 2: return encode<2, 1>(in, first, last);
    case 3: return encode<3, 1>(in, first, last);
    case 4: return encode<4, 1>(in, first, last);
    default: return encode<5, 1>(in, first, last);
  }
}

}  // namespace AQ_ISA
}  // namespace aq
