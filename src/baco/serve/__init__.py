"""An OpenAI-compatible server on one batching decoder."""
