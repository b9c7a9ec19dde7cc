"""What the stages and the analysis share: models, data, masks, permutations, training, files."""
