"""llama.cpp in this process: the library, the weights of a GGUF file, sequences of tokens."""
