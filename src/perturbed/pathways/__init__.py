"""Gene sets, their enrichment in ranked lists of genes, and the judgement of pathways."""
