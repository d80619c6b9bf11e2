// Functions of vectors, from additions, products and one division: the same bits in every lane.
#pragma once

#include "simd.h"

namespace aq {
namespace AQ_ISA {

// c[0] + c[1] t + c[2] t^2 ...
template <int N>
inline F polynomial(const float (&c)[N], F t) {
  F y = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = fma(y, t, splat(c[i]));
  return y;
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87 (Cephes, expf): x = n ln 2 + r, and e^r is a polynomial.
inline F exp(F x) {
  static const float c[] = {1, 1, 5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f, 8.3334519073e-3f,
                            1.3981999507e-3f, 1.9875691500e-4f};
  const F low = splat(-87), bounded = max(x, low), round = splat(0x1.8p23f);
  const F shifted = fma(bounded, splat(1.44269504f), round), n = shifted - round;
  const F r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), bounded));
  const F power = as_float((as_int(shifted) - as_int(round) + 127) << 23);
  const F y = x < low ? F{} : polynomial(c, r) * power;
  return x == x ? y : x;
}

// x Phi(x), Phi being the normal distribution, 0 below -5.4: Phi(x) - 1/2 is x times a quotient of polynomials of x^2,
// fitted by weighted least squares up to 5.4, above which Phi is 1 in float32. At most 2.6 units in the last place of x
// off.
inline F gelu(F x) {
  static const float p[] = {0.398942232131958f,      0.03343689441680908f,    0.004655006807297468f,
                            0.00016501870413776487f, 6.3683419284643605e-06f, 2.3355621436849106e-08f};
  static const float q[] = {1,                      0.2504798173904419f,     0.028416255488991737f,
                            0.001862842938862741f,  7.264426676556468e-05f,  1.216315467900131e-06f};
  const F bounded = min(max(x, splat(-5.4f)), splat(5.4f)), t = bounded * bounded;
  const F y = x * fma(bounded, polynomial(p, t) / polynomial(q, t), splat(0.5f));
  return x < -5.4f ? x * 0 : y;
}

// (1 - e^-2x) / (1 + e^-2x)
inline F tanh(F x) {
  const F e = exp(splat(-2) * (x < 0 ? -x : x)), y = (splat(1) - e) / (splat(1) + e);
  return x < 0 ? -y : y;
}

// x / (1 + e^-x)
inline F silu(F x) {
  const F e = exp(x < 0 ? x : -x);
  return x * (x < 0 ? e : splat(1)) / (splat(1) + e);
}

// x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2.
inline F gelu_tanh(F x) {
  const F u = splat(0.797884560802865f) * fma(x * x * x, splat(0.044715f), x);
  const F e = exp(splat(-2) * (u < 0 ? -u : u));
  return x * (u < 0 ? e : splat(1)) / (splat(1) + e);
}

}  // namespace AQ_ISA
}  // namespace aq
