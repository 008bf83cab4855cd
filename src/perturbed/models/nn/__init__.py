"""Blocks the torch models share."""
