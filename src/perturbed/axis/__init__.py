"""Genes along the axis from unperturbed to perturbed cells of a scVI decoder: scores, rivals, intervals, validity."""
