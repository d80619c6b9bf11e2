// The search for grids of small squared error.
#pragma once

#include "grids.h"

namespace aq {
namespace AQ_ISA {

// How many groups are searched in one call, and the floats of memory that it takes.
int64_t searched_together(int64_t group);
int64_t search_floats(int64_t group);

// Find the grids of some groups of one size, given their ranges.
Grid search(const Groups& in, const float* x, int64_t groups, int64_t size, F low, F high, float* elements);

}  // namespace AQ_ISA
}  // namespace aq
