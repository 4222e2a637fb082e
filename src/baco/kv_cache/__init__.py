"""What the models have read of every sequence: storage and protocol. It knows no model."""
