"""Every method of the benchmark behind one `fit` / `predict` door."""
