"""Statistics over seeds: means, and differences to naive, paired by seeds."""

import math

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # Student's t; scipy.stats takes a second to import

from analyze.lib.runs import CELL, NETWORK, SEEDS, baselines, by_pair, shared_networks, variants

DIFFERENCES = """baseline difference difference_se difference_low difference_high pairs
    gap_closed gap_low gap_high""".split()


def against_naive(
    pairs: pd.DataFrame, compared: dict[str, list[tuple[str, str]]]
) -> dict[str, dict[str, float]]:
    """For every variant: its difference to naive, and the share of the LTH-naive gap closed.

    `pairs` has a row a pair and a column a variant, `compared` is from `baselines`. Differences are
    means over pairs, with standard error and 95% interval. The share is in percent, both as means
    over the pairs that have all three; it is missing where there is no gap. Intervals are missing
    where pairs share a network, as such pairs are not independent.
    """
    found, independent = {}, not shared_networks(pairs.index.to_frame())
    for variant in pairs.columns:
        usable = (
            (naive, lth)
            for naive, lth in compared[variant]
            if naive in pairs and pairs[[variant, naive]].notna().all(axis=1).any()
        )
        naive, lth = next(usable, (variant, ""))
        if naive == variant:
            continue
        difference = (pairs[variant] - pairs[naive]).dropna()
        low, high = t_interval(difference) if independent else (math.nan, math.nan)
        mean, error = difference.mean(), difference.sem()
        row = dict(zip(DIFFERENCES, (naive, mean, error, low, high, len(difference))))
        if lth in pairs:
            both = pairs[list({lth, naive, variant})].dropna()
            gain, gap = both[variant] - both[naive], both[lth] - both[naive]
            if gap.mean() > 0:
                row["gap_closed"] = 100 * gain.mean() / gap.mean()
                if independent:
                    ends = ratio_interval(gain, gap)
                    row["gap_low"], row["gap_high"] = (100 * end for end in ends)
        found[variant] = row
    return found


def t_interval(values: pd.Series) -> tuple[float, float]:
    """The 95% interval of the mean (Student); missing for a single value."""
    half = stdtrit(len(values) - 1, 0.975) * values.sem()
    return values.mean() - half, values.mean() + half


def ratio_interval(numerators: pd.Series, denominators: pd.Series) -> tuple[float, float]:
    """The 95% interval of the ratio of two paired means (Fieller 1954).

    Missing for a single pair, and where the mean denominator cannot be told from zero.
    """
    count = len(numerators)
    if count < 2:
        return math.nan, math.nan
    (aa, ab), (_, bb) = np.cov(numerators, denominators) / count
    t, mean = stdtrit(count - 1, 0.975), denominators.mean()
    g = t**2 * bb / mean**2 if mean else math.inf
    if g >= 1:
        return math.nan, math.nan
    ratio = numerators.mean() / mean
    slope = ab / bb if bb > 0 else 0.0
    spread = aa - 2 * ratio * ab + ratio**2 * bb - g * (aa - slope * ab)
    middle, half = ratio - g * slope, t / abs(mean) * math.sqrt(max(spread, 0.0))
    return (middle - half) / (1 - g), (middle + half) / (1 - g)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell and variant: mean, sample std, number of runs, and `against_naive`."""
    key = [*CELL, "variant"]
    grouped = runs.assign(variant=variants(runs)).groupby(key)["test_acc"]
    accuracy = grouped.agg(["mean", "std", "count"]).reset_index()
    compared = baselines(runs)
    rows = [
        (*cell, variant, *(row.get(name) for name in DIFFERENCES))
        for cell, pairs in by_pair(runs).groupby(level=CELL)
        for variant, row in against_naive(pairs, compared).items()
    ]
    differences = pd.DataFrame(rows, columns=[*key, *DIFFERENCES])
    return accuracy.merge(differences.astype(accuracy.dtypes[key]), "left", key)


def overall(runs: pd.DataFrame) -> pd.DataFrame:
    """As `summary`, a row a network and variant, of each pair's mean over the complete cells."""
    compared, rows = baselines(runs), []
    for key, cells in by_pair(runs).groupby(level=NETWORK):
        complete = cells.dropna(axis=1, how="all").dropna()
        pairs = complete.groupby(level=[*NETWORK, *SEEDS]).mean()
        differences = against_naive(pairs, compared)
        for variant, values in pairs.items():
            row = dict(zip(NETWORK, key)) | {"variant": variant, "count": len(pairs)}
            row |= {"mean": values.mean(), "std": values.std()}
            rows.append(row | differences.get(variant, {}))
    return pd.DataFrame(rows, columns=[*NETWORK, "variant", "mean", "std", "count", *DIFFERENCES])
