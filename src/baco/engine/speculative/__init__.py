"""Speculative decoding: what to draft, and when."""
