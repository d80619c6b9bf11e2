"""Convert models larger than memory: file by file, by several processes, and resumed after an interruption."""
