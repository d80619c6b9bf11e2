"""One corridor for every conversion: a source that is open is treated, solved, written, and what goes beside it copied.

source          what a format opens: tensors by name, and what there is to know of them
prequantized    which checkpoints are quantized already
sidefiles       what goes beside the weights
corridor        from an open source to a table
dry_run         what would be written
"""
