"""Length prediction: how well is the length known before a token is written, and while it is."""
