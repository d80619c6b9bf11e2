"""Models larger than memory: converted file by file, by as many processes as there are, and taken up again."""
