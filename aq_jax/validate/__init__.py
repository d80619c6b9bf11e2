"""Whether quantized models are as small, as good and as fast as is claimed: measured, judged, and written down."""
