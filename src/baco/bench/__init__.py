"""Measures the speed of paired decoding next to other ways to decode, in one run."""
