"""One corridor for every conversion: treat the tensors of an open source, solve them, write them, copy the side files.

source          named tensors, as a format opens them
prequantized    recognizes checkpoints that are quantized already
sidefiles       the files that go beside the weights
corridor        from an open source to a table
write           from tensors to rows
dry_run         lists the rows without writing them
shards          a folder of tables, by several processes
"""
