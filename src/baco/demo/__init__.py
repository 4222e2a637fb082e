"""The embedded pair: its toy world, its training, its weights."""
