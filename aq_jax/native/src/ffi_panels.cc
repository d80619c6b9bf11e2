// Weights become panels, when Python prepares them, without JAX.
#include <cstring>
#include <vector>

#include "ffi.h"

namespace aq {
namespace {

// Move every second field of FROM bits up, so that fields lie TO bits apart; `keep` masks the others.
template <int FROM, int TO>
uint64_t spread(uint64_t fields, uint64_t keep) {
  return (fields & keep) | (fields & ~keep) << (TO - FROM);
}

// Codes of a row, unsigned: out of the format's bit stream, or of signed bytes.
template <int BITS>
void read_row(const uint8_t* from, bool packed, int64_t count, uint8_t* to) {
  constexpr uint8_t half = 1 << (BITS - 1);
  if (BITS == 8 || !packed) {
    for (int64_t i = 0; i < count; ++i) to[i] = uint8_t(from[i] + half);
    return;
  }
  for (int64_t i = 0; i < count; i += 8, from += BITS) {
    const int64_t some = std::min<int64_t>(8, count - i);
    uint64_t run = 0;
    if (some == 8)  // known when this is compiled
      std::memcpy(&run, from, BITS);
    else
      std::memcpy(&run, from, (some * BITS + 7) / 8);
    run = spread<4 * BITS, 32>(run, (uint64_t(1) << (4 * BITS)) - 1);
    run = spread<2 * BITS, 16>(run, ((uint64_t(1) << (2 * BITS)) - 1) * 0x0000000100000001);
    run = spread<BITS, 8>(run, uint64_t(2 * half - 1) * 0x0001000100010001);
    if (some == 8)
      std::memcpy(to + i, &run, 8);
    else
      std::memcpy(to + i, &run, some);
  }
}

// Panels may have more bits than the codes that become them.
template <int BITS>
void to_panels(const uint8_t* codes, bool packed, int64_t code_bits, const Weight& w, uint32_t* panels, int32_t* sums) {
  constexpr int main = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, rest = BITS - main, each = 8 / main;
  constexpr int steps = 8 / (rest ? rest : main), lines = steps * BITS / 8;
  constexpr uint32_t low = 0x01010101u * ((1 << main) - 1), high = 0x01010101u * ((1 << rest) - 1);
  const int64_t size = w.size(), padded = w.padded(), width = w.groups * padded;
  const int64_t stride = width + 64;  // rows a power of two apart would evict each other
  const int64_t bytes = packed ? w.inputs * code_bits / 8 : w.inputs;
  decltype(&read_row<8>) const readers[] = {read_row<2>, read_row<3>, read_row<4>, read_row<5>,
                                            read_row<6>, read_row<8>, read_row<8>};
  const auto read = readers[code_bits - 2];
  const uint8_t more = (1 << (BITS - 1)) - (1 << (code_bits - 1));
  std::vector<uint8_t> rows(PANEL * stride), row(w.inputs);
  for (int64_t panel = 0; panel < w.panels(); ++panel) {
    std::fill(rows.begin(), rows.end(), 0);
    for (int64_t lane = 0; lane < std::min<int64_t>(PANEL, w.outputs - panel * PANEL); ++lane) {
      read(codes, packed, w.inputs, row.data());
      for (int64_t i = 0; more && i < w.inputs; ++i) row[i] = uint8_t(row[i] + more);
      codes += bytes;
      for (int64_t g = 0; g < w.groups; ++g) {
        int32_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += row[g * size + i];
        *sums++ = sum - int32_t(size << (BITS - 1));
        std::memcpy(&rows[lane * stride + g * padded], &row[g * size], size);
      }
    }
    for (int64_t chunk = 0; chunk < width; chunk += 4 * steps, panels += lines * PANEL)
      for (int64_t lane = 0; lane < PANEL; ++lane) {
        uint32_t words[steps];
        std::memcpy(words, &rows[lane * stride + chunk], sizeof words);
        for (int l = 0; l < steps / each; ++l) {
          uint32_t line = 0;
          for (int i = 0; i < each; ++i) line |= (words[l * each + i] & low) << (main * i % 32);
          panels[l * PANEL + lane] = line;
        }
        if constexpr (rest != 0) {
          uint32_t line = 0;
          for (int s = 0; s < steps; ++s) line |= (words[s] >> main & high) << (rest * s);
          panels[(lines - 1) * PANEL + lane] = line;
        }
      }
  }
}

}  // namespace
}  // namespace aq

// Turn codes [outputs, inputs], a bit stream for each row or signed bytes, into panels of so many bits or more, and sum
// those of each group.
AQ_EXPORT void aq_to_panels(const uint8_t* codes, int packed, int64_t code_bits, int64_t bits, int64_t outputs,
                            int64_t inputs, int64_t groups, uint32_t* panels, int32_t* sums) {
  const aq::Weight w = {nullptr, nullptr, nullptr, outputs, inputs, groups, bits};
  switch (bits) {
    case 2: return aq::to_panels<2>(codes, packed, code_bits, w, panels, sums);
    case 3: return aq::to_panels<3>(codes, packed, code_bits, w, panels, sums);
    case 4: return aq::to_panels<4>(codes, packed, code_bits, w, panels, sums);
    case 5: return aq::to_panels<5>(codes, packed, code_bits, w, panels, sums);
    case 6: return aq::to_panels<6>(codes, packed, code_bits, w, panels, sums);
    default: return aq::to_panels<8>(codes, packed, code_bits, w, panels, sums);
  }
}
