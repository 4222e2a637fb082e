"""Datasets of answers: duplicates, a report, and a copy without duplicates.

Rows are read as a stream, so a dataset may be larger than memory. Nothing here loads a pair.
"""
