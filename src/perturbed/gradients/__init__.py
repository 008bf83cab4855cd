"""Derivatives of a decoder with respect to its latent space: Jacobians, flows and gene scores."""
