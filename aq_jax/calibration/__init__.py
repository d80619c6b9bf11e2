"""What runs a model to quantize it: text, statistics of what its layers are given, weights solved on them."""
