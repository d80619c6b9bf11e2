// The functions of one instruction set. A row's result depends on no other row, and not on how rows are shared out.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace aq {
namespace AQ_ISA {

template <class Pointer>
using Function = std::remove_pointer_t<Pointer>;

Function<decltype(Kernels::quantize_rows)> quantize_rows;
Function<decltype(Kernels::rotate_rows)> rotate_rows;
Function<decltype(Kernels::product)> product;
Function<decltype(Kernels::rows)> rows;
Function<decltype(Kernels::normalize)> normalize;
Function<decltype(Kernels::attention)> attention;
Function<decltype(Kernels::dequantize)> dequantize;
Function<decltype(Kernels::quantize)> quantize;
Function<decltype(Kernels::trellis)> trellis;
Function<decltype(Kernels::decode_tiles)> decode_tiles;

}  // namespace AQ_ISA
}  // namespace aq
