"""Generators of Perturb-seq cells with planted truth."""
