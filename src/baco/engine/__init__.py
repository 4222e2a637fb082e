"""The decoder: token sequences in, token sequences with their sources out. No text in here."""
