"""Figures: read tables, draw, write picture and source data; no computing."""
