"""Trained decoders behind one protocol: `decode(z, context) -> expression, heads`."""
