"""A Ray cluster: reaching one, and having functions called by its worker processes."""
