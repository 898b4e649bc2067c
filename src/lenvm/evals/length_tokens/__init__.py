"""Length tokens: which tokens make the model expect a longer, or a shorter, answer."""
