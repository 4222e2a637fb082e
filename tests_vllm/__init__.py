"""What a pair inside vLLM does; run by ``make test-vllm``, in an environment that has vLLM."""
