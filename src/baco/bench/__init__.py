"""Measures how fast paired decoding is beside what else there is, side by side in one run."""
