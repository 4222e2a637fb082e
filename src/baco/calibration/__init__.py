"""What a router does to a pair: measured, stored, diagnosed."""
