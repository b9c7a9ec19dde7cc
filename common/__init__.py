"""Code shared by the stages and the analysis: models, data, masks, alignment, training, files."""
