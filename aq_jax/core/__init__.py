"""Pure, jitted mathematics on arrays: grids, packing, the quantized tensor, and what a model does with it."""
