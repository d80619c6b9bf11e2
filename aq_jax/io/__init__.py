"""Load tables as arrays of a framework, and save arrays: `WeightLoader`, `load`, `save`."""
