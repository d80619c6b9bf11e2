"""Quantize a model by running it: on text, from the statistics of its layers' inputs."""
