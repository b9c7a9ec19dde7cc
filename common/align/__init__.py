"""Axes, permutation and matching: how a source network is permuted onto a target."""
