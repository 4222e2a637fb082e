"""The effect of a router on a pair: measured, stored, diagnosed."""
