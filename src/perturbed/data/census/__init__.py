"""Cells of the CELLxGENE Census, and scVI models trained on it: queries, frozen files, simulated stores, models."""
