"""Measuring methods: what a set of answers is worth, and how methods compare."""
