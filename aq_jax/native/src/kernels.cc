// The kernels of one instruction set, in a table.
#include "set.h"

namespace aq {
namespace AQ_ISA {

#define AQ_TEXT_(x) #x
#define AQ_TEXT(x) AQ_TEXT_(x)

extern const Kernels kernels;
const Kernels kernels = {AQ_TEXT(AQ_ISA), quantize_rows, rotate_rows, product,  rows,
                         normalize,       attention,     dequantize,  quantize, trellis, decode_tiles};

}  // namespace AQ_ISA
}  // namespace aq
