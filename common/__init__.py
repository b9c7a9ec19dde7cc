"""What the four stages and the analysis share: models, data, masks, permutations, training, files."""
