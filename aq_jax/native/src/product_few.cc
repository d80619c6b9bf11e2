// Products of few rows, one by one: codes go from memory into registers, of several panels at once.
#include "product.h"

namespace aq {
namespace AQ_ISA {
namespace {

// Panels at once: independent sums hide the latency of each, and processors read ahead of four streams better than of
// two. Where four would not leave enough registers, it is two.
template <int DIGITS, int BITS>
constexpr int AT_ONCE = VECTORS == 2 && DIGITS == 1 && BITS % 4 == 0 ? 4 : std::max(1, 4 / VECTORS);

// Chunks whose products are added in 16 bits; see pair_sums.
template <int DIGITS, int BITS>
constexpr int IN_PAIRS = DIGITS ? pair_sums(BITS) / Planes<BITS>::STEPS : 0;

// Four products more for each lane.
template <int DIGITS, int BITS, int STEP, int N>
inline __attribute__((always_inline)) void step(const int8_t* x, int64_t stride, const uint8_t* const (&chunk)[N],
                                                I (&sums)[N][DIGITS]) {
  I four[DIGITS];
  for (int d = 0; d < DIGITS; ++d) four[d] = splat4(x + d * stride + 4 * STEP);
  for (int n = 0; n < N; ++n) {
    const U codes = (U)step_of<BITS, STEP>(chunk[n]);
    for (int d = 0; d < DIGITS; ++d)
      if constexpr (IN_PAIRS<DIGITS, BITS> > 0)
        sums[n][d] = add_pairs(sums[n][d], codes, four[d]);
      else
        sums[n][d] = dot4<(BITS < 8)>(sums[n][d], codes, four[d]);
  }
}

template <int DIGITS, int BITS, int STEP, int N>
inline __attribute__((always_inline)) void step(const float* x, int64_t, const uint8_t* const (&chunk)[N],
                                                F (&sums)[N][1]) {
  W codes[N];
  for (int n = 0; n < N; ++n) codes[n] = signed_step_of<BITS, STEP>(chunk[n]);
  unroll<4>([&](auto j) {
    const F one = splat(x[4 * STEP + j]);
    for (int n = 0; n < N; ++n) sums[n][0] = fma(one, float_of<j>(codes[n]), sums[n][0]);
  });
}

template <int DIGITS, int BITS, int PANELS>
void panels_of_row(const Operand<DIGITS>& x, const Weight& w, int64_t row, int64_t rows, int64_t panel, float* totals) {
  using P = Planes<BITS>;
  using K = Kind<DIGITS>;
  constexpr int N = PANELS * VECTORS;
  const auto* in = x.x + row * K::LINES * x.stride;
  const Part<DIGITS>* part = x.parts + row;
  const uint8_t* chunk[N];
  for (int n = 0; n < N; ++n) chunk[n] = w.codes + (panel + n / VECTORS) * w.bytes() + n % VECTORS * (4 * LANES);
  // How far ahead bytes are fetched. With four panels a little: the processor reads ahead of each by itself, but does
  // not know that a panel's bytes end, where the fetch goes on in the next four. With fewer, whose bytes come too
  // slowly that way, it is the same place in the panels that come next.
  const int64_t bytes = w.bytes(), ahead = PANELS < 4 ? bytes : 16 * LINE;
  int64_t unread = bytes;
  F total[N] = {};
  GridsOf<PANELS> grids(w, panel);
  for (int64_t g = 0; g < w.groups; ++g) {
    grids.next(g);
    for (int64_t left = w.padded(); left > 0; left -= K::PART, part += rows) {
      constexpr int in_pairs = IN_PAIRS<DIGITS, BITS>;
      typename K::Sums sums[N][K::LINES] = {}, wide[N][K::LINES] = {};
      for (int64_t chunks = std::min(left, K::PART) / (4 * P::STEPS), c; chunks > 0; chunks -= c) {
        c = in_pairs ? std::min<int64_t>(chunks, in_pairs) : chunks;
        for (int64_t i = c; i > 0; --i, in += 4 * P::STEPS) {
          unroll<P::STEPS>([&](auto s) { step<DIGITS, BITS, s, N>(in, x.stride, chunk, sums); });
          const int64_t next = ahead + (unread > ahead ? 0 : (PANELS - 1) * bytes);
          unread -= P::LINES * LINE;
          for (int n = 0; n < N; ++n) {
            if (n % VECTORS == 0)
              for (int l = 0; l < P::LINES; ++l) __builtin_prefetch(chunk[n] + next + l * LINE);
            chunk[n] += P::LINES * LINE;
          }
        }
        if constexpr (in_pairs > 0)
          for (int n = 0; n < N; ++n)
            for (int d = 0; d < DIGITS; ++d) wide[n][d] = add_widened(wide[n][d], sums[n][d]), sums[n][d] = I{};
      }
      for (int n = 0; n < N; ++n) {
        const GridAt grid = grids.at(n / VECTORS, g);
        total[n] = join<DIGITS>(total[n], in_pairs ? wide[n] : sums[n], *part, grid, n % VECTORS * LANES, P::ADDED,
                                int(w.lift));
      }
    }
  }
  for (int n = 0; n < N; ++n) store(totals + n * LANES, total[n]);
}

}  // namespace

template <int DIGITS>
void product_few(const Operand<DIGITS>& x, const Inputs& in, const Weight& w, const After& after, int64_t row,
                 int64_t rows, int64_t panel, int64_t panel_end, float* y) {
  with_bits(w.bits, [&](auto bits) {
    constexpr int most = AT_ONCE<DIGITS, bits>, pair = std::min(2, most);
    float totals[most * PANEL];
    for (int64_t p = panel, count; p < panel_end; p += count) {
      const int64_t left = panel_end - p;
      count = left >= most ? most : left >= pair ? pair : 1;
      const auto run = count == most   ? panels_of_row<DIGITS, bits, most>
                       : count == pair ? panels_of_row<DIGITS, bits, pair>
                                       : panels_of_row<DIGITS, bits, 1>;
      for (int64_t r = 0; r < rows; ++r) {
        run(x, w, r, rows, p, totals);
        finish(in, w, after, row + r, 1, p * PANEL, count * PANEL, totals, most * PANEL, y);
      }
    }
  });
}

template void product_few(const Operand<1>&, const Inputs&, const Weight&, const After&, int64_t, int64_t, int64_t,
                          int64_t, float*);
template void product_few(const Operand<FLOAT_DIGITS>&, const Inputs&, const Weight&, const After&, int64_t, int64_t,
                          int64_t, int64_t, float*);

}  // namespace AQ_ISA
}  // namespace aq
