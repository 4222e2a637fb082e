"""A pair in other libraries."""
