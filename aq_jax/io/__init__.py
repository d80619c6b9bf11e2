"""Tables to arrays of a framework and back: `WeightLoader`, `load`, `save`."""
