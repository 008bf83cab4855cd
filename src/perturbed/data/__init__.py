"""From a dataset card to prepared, split and featurised cells."""
