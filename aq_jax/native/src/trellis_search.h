// The cheapest path through a trellis: Viterbi over states of 12 bits, of which every step shifts in BITS new ones.
//
// A state s = new << (12 - BITS) | m follows from a state p if m = p >> BITS: the step's cost is that of the state's
// level or, with VALUES = 2, of its two. What is kept of every step is the least cost of each m, which leads to all
// states that end in it; which of the 2^BITS states before gave it is computed again on the way back, for one path.
//
// Costs lie so that no lane is ever moved but in one shuffle a vector: numbers with the same low bits of m, which one
// minimum runs over, are in vectors whose lanes are the new bits and, where these are fewer, the highest bits of m.
#pragma once

#include <cmath>

#include "simd.h"

namespace aq {
namespace AQ_ISA {

constexpr int STATE_BITS = 12, STATES = 1 << STATE_BITS;

// What one step is to come near to, in levels, and what errors weigh: that of the second value beside the first, and
// this step's beside the next one's.
struct Step {
  float x[2];
  float second, ratio;
};

template <int BITS, int VALUES>
struct Trellis {
  static constexpr int NEW = 1 << BITS, ENDS = STATES >> BITS;  // choices of a step; values of m
  static constexpr int TOPS = LANES > NEW ? LANES / NEW : 1;    // highest bits of m that share a vector
  static constexpr int VECTORS = LANES > NEW ? 1 : NEW / LANES;
  static constexpr int REST = ENDS / TOPS, OUTER = REST / NEW;
  static_assert(OUTER >= 1 && TOPS <= NEW);

  float levels[VALUES][STATES];             // by state
  alignas(64) float lanes[VALUES][STATES];  // in the order in which they are used

  explicit Trellis(const int8_t* table) {
    for (int v = 0; v < VALUES; ++v) {
      for (int s = 0; s < STATES; ++s) levels[v][s] = table[v * STATES + s];
      float* to = lanes[v];
      for (int high = 0; high < OUTER; ++high)
        for (int low = 0; low < NEW; ++low)
          for (int c = 0; c < NEW; ++c)
            for (int top = 0; top < TOPS; ++top)
              *to++ = levels[v][(c << (STATE_BITS - BITS)) | (top * REST + high * NEW + low)];
    }
  }

  // Where the cost of m lies.
  static int place(int m) {
    const int top = m / REST, rest = m % REST;
    return (rest % OUTER * NEW + rest / OUTER) * TOPS + top;
  }

  // Floats that lie together, again and again.
  static F repeat(const float* p) {
    if constexpr (TOPS == 1) {
      return splat(*p);
    } else {
#if defined(__AVX512VNNI__)
      if constexpr (TOPS == 2) {
        double both;
        std::memcpy(&both, p, 8);
        return (F)_mm512_castpd_ps(_mm512_set1_pd(both));
      } else {
        return (F)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
      }
#elif defined(__AVX2__)
      double both;
      std::memcpy(&both, p, 8);
      return (F)_mm256_castpd_ps(_mm256_set1_pd(both));
#endif
    }
  }

  // From lanes (new bits, highest bits) to (lower new bits, highest bits; highest new bits), those of the next m.
  static F turned(F v) {
    if constexpr (TOPS == 1) {
      return v;
    } else {
      I from;
      constexpr int tops = TOPS, others = LANES / TOPS;
      for (int i = 0; i < LANES; ++i) from[i] = i % tops * others + i / tops;
#if defined(__AVX512VNNI__)
      return (F)_mm512_permutexvar_ps((__m512i)from, (__m512)v);
#elif defined(__AVX2__)
      return (F)_mm256_permutevar8x32_ps((__m256)v, (__m256i)from);
#endif
    }
  }

  void advance(const float* before, const Step& step, float* after) const {
    const F x0 = splat(step.x[0]), x1 = splat(step.x[1]), second = splat(step.second), ratio = splat(step.ratio);
    const float *l0 = lanes[0], *l1 = lanes[VALUES - 1];
    for (int high = 0; high < OUTER; ++high) {
      F best[VECTORS];
      for (int i = 0; i < VECTORS; ++i) best[i] = splat(__builtin_inff());
      for (int low = 0; low < NEW; ++low) {
        const int rest = high * NEW + low;
        const F cost = repeat(before + (rest % OUTER * NEW + rest / OUTER) * TOPS);
        for (int i = 0; i < VECTORS; ++i) {
          F d = x0 - load<F>(l0);
          F sum = fma(d, d, cost);
          l0 += LANES;
          if constexpr (VALUES == 2) {
            d = x1 - load<F>(l1);
            sum = fma(d * second, d, sum);
            l1 += LANES;
          }
          best[i] = min(sum, best[i]);
        }
      }
      for (int i = 0; i < VECTORS; ++i) store(after + high * TOPS * NEW + i * LANES, turned(best[i] * ratio));
    }
  }

  // The best state of a step that leads to m.
  int before(const float* costs, const Step& step, int m) const {
    const int c = m / (ENDS / NEW), high = m % (ENDS / NEW);
    float least = __builtin_inff();
    int best = (c << (STATE_BITS - BITS)) | (high * NEW);
    for (int low = 0; low < NEW; ++low) {
      const int end = high * NEW + low, s = (c << (STATE_BITS - BITS)) | end;
      float d = step.x[0] - levels[0][s];
      float sum = std::fma(d, d, costs[place(end)]);
      if constexpr (VALUES == 2) {
        d = step.x[1] - levels[1][s];
        sum = std::fma(d * step.second, d, sum);
      }
      if (sum < least) least = sum, best = s;
    }
    return best;
  }

  // Find the states of `count` steps. They follow a state that ended in `first`, and end in `last`; -1 for any.
  // `costs` has room for (count + 1) * ENDS floats.
  void find(const Step* steps, int64_t count, int first, int last, float* costs, uint16_t* states) const {
    for (int m = 0; m < ENDS; ++m) costs[m] = first < 0 ? 0.0f : 1e30f;
    if (first >= 0) costs[place(first)] = 0.0f;
    for (int64_t e = 0; e < count; ++e) advance(costs + e * ENDS, steps[e], costs + (e + 1) * ENDS);
    const float* end = costs + count * ENDS;
    int m = last;
    if (last < 0) {
      m = 0;
      for (int other = 1; other < ENDS; ++other)
        if (end[place(other)] < end[place(m)]) m = other;
    }
    for (int64_t e = count; e-- > 0;) {
      const int s = before(costs + e * ENDS, steps[e], m);
      states[e] = uint16_t(s);
      m = s & (ENDS - 1);
    }
  }
};

}  // namespace AQ_ISA
}  // namespace aq
