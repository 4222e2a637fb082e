"""Tests of the llamacpp backend, which need llama-cpp-python: ``make test-llamacpp``."""

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llamacpp")
