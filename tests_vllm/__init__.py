"""Tests of a pair inside vLLM, for ``make test-vllm``, in an environment that has vLLM."""
