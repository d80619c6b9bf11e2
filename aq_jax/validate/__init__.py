"""Validate quantized models: measure size, accuracy and speed, judge them by thresholds, and write it down."""
