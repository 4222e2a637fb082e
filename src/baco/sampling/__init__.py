"""How a token is drawn from logits: parameters, sampler, replayable noise."""
