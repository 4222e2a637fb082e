"""How a token is drawn from a row of logits: parameters, sampler, replayable noise."""
