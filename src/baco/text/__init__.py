"""Text in and out of token ids: bytes of tokens, vocabulary, prompts, detokenizer."""
