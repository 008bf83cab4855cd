"""Metrics, their floors and ceilings, leakage checks and statistics."""
