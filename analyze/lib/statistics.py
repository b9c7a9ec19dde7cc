"""Statistics over seeds: means, and differences to naive, paired by seeds."""

import math

import numpy as np
import pandas as pd
from scipy.special import nctdtrinc, stdtr, stdtrit  # scipy.stats takes a second to import

from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    VARIANT,
    accuracy_by_pair,
    shared_networks,
    with_gains,
)

PAIRED = "difference difference_se difference_low difference_high p detectable pairs".split()
DIFFERENCES = [*PAIRED, "p_holm", "gap_closed", "gap_low", "gap_high"]


def paired_test(differences: pd.Series, independent: bool = True) -> dict[str, float]:
    """Return mean, standard error, 95% interval and p (Student) of the differences of pairs.

    `detectable` is the true difference that would be significant with a probability of 80%
    (noncentral t). Only the mean and the number of pairs are given for one pair, for pairs that are
    not independent, and for equal differences, which two pairs can easily have by chance: none of
    these has a spread to test against.
    """
    count, mean = len(differences), differences.mean()
    testable = independent and count > 1 and np.ptp(differences) > 1e-9
    error = differences.sem() if testable else math.nan
    t = stdtrit(max(count - 1, 1), 0.975)
    p = 2 * stdtr(count - 1, -abs(mean) / error)
    detectable = error * nctdtrinc(max(count - 1, 1), 0.2, t)
    return dict(
        zip(PAIRED, (mean, error, mean - t * error, mean + t * error, p, detectable, count))
    )


def holm(p: pd.Series) -> pd.Series:
    """Correct the p values of a family of tests for multiple testing (Holm 1979)."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def gain_statistics(pairs: pd.DataFrame) -> dict[str, float]:
    """Return the `paired_test` of a variant's gains, and the share of the gap that they close.

    `pairs` are rows of `with_gains`. The share, in percent, is the ratio of the means over pairs,
    with a 95% interval; it is missing if there is no gap or a pair lacks one. Intervals are missing
    if pairs share a network, because such pairs are not independent.
    """
    independent = not shared_networks(pairs)
    row = paired_test(pairs["gain"], independent)
    gain, gap = pairs["gain"], pairs["gap"]
    if gap.mean(skipna=False) > 0:
        bounds = ratio_interval(gain, gap) if independent else (math.nan, math.nan)
        shares = 100 * np.array([gain.mean() / gap.mean(), *bounds])
        row |= dict(zip(("gap_closed", "gap_low", "gap_high"), shares))
    return row


def ratio_interval(numerators: pd.Series, denominators: pd.Series) -> tuple[float, float]:
    """Return the 95% interval of the ratio of two paired means (Fieller 1954).

    It is NaN for a single pair, and if the mean denominator is not significantly different from 0.
    """
    count, n, d = len(numerators), numerators.mean(), denominators.mean()
    if count < 2:
        return math.nan, math.nan
    (nn, nd), (_, dd) = stdtrit(count - 1, 0.975) ** 2 * np.cov(numerators, denominators) / count
    if d**2 <= dd:
        return math.nan, math.nan
    # At either bound r the t test of numerator - r * denominator has p = 5%.
    low, high = np.sort(np.roots([d**2 - dd, 2 * (nd - n * d), n**2 - nn]).real)
    return low, high


def mean_over_cells(pairs: pd.DataFrame) -> pd.DataFrame:
    """Average the accuracy of each pair and variant over the cells of a network.

    `pairs` are rows of `with_gains`. Only networks with several cells that compare something have
    rows, and only variants that are in all of these cells. Only pairs that have all of these
    variants in all of these cells count.
    """
    rows = pairs[pairs.groupby(CELL)["gain"].transform("count") > 0].copy()
    rows["cell"] = rows.groupby(CELL).ngroup()
    cells = rows.groupby(NETWORK)["cell"].transform("nunique")
    variant_cells = rows.groupby([*NETWORK, "variant"])["cell"].transform("nunique")
    rows = rows[(cells > 1) & (variant_cells == cells)]
    variants = rows.groupby(NETWORK)["variant"].transform("nunique")
    sizes = rows.groupby([*NETWORK, *SEEDS])["variant"].transform("size")
    complete = sizes == variants * cells[rows.index]
    return rows[complete].groupby([*NETWORK, *SEEDS, *VARIANT], as_index=False)["test_acc"].mean()


def summary(runs: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Return mean, sample std and number of runs and the `gain_statistics` per cell and variant.

    Rows of `mean_over_cells` have no sparsity and rewind epoch. Holm's family is all rows of a
    network. With `against`, differences are to that variant instead of naive.
    """
    pairs, keys = accuracy_by_pair(runs), [*CELL, "arm", "variant"]
    means = mean_over_cells(with_gains(pairs, against))
    cells = pd.concat([runs, means]).groupby(CELL, dropna=False)[[*keys[-2:], "test_acc"]]
    # One groupby over all keys would sum in another order and change the last digit.
    table = cells.apply(
        lambda cell: cell.groupby(keys[-2:])["test_acc"].agg(["mean", "std", "count"])
    ).reset_index()
    gains = with_gains(pd.concat([pairs, means]), against).dropna(subset="gain")
    groups = gains.groupby(keys, dropna=False)
    rows = [dict(zip(keys, values)) | gain_statistics(group) for values, group in groups]
    tests = pd.DataFrame(rows, columns=[*keys, *DIFFERENCES]).astype(table.dtypes[keys])
    table = table.merge(tests, "left", keys)
    table["cell"] = list(map(cell_name, table["sparsity"], table["rewind"]))
    table["p_holm"] = table.groupby(NETWORK)["p"].transform(holm)
    return table.astype({"rewind": "Int64", "count": int, "pairs": "Int64"})


def findings(table: pd.DataFrame) -> list[str]:
    """Return a sentence per network on whether permuting the mask helps, from rows of `summary`."""
    sentences = []
    for (model, width, dataset), rows in table.groupby(NETWORK):
        other = rows["variant"].str.contains(r" \+ |\(identity")  # not of the permutation alone
        rows = rows[(rows["arm"] == "permuted") & ~other & rows["difference"].notna()]
        rows = rows.sort_values("sparsity", na_position="first", kind="stable")
        text = "no permuted mask can be compared with an unpermuted one yet"
        for row in rows.head(1).itertuples():
            text, end = "whether permuting the mask helps cannot be told from these runs", ""
            bounds = format_interval(row.difference_low, row.difference_high)
            if row.difference_low * row.difference_high > 0:
                text = f"permuting the mask {'helps' if row.difference > 0 else 'hurts'}"
                if gap_bounds := format_interval(row.gap_low, row.gap_high):
                    end = (
                        f"; that is {row.gap_closed:.0f}%{gap_bounds} of the gap to the mask's own"
                    )
                    end += " network"
            elif bounds:
                end = f"; so many can show a difference of {row.detectable:.1f} points"
            text += f": {row.difference:+.1f} points of test accuracy over the unpermuted mask"
            if bounds:
                text += f", 95% interval{bounds}"
            if row.p < 0.05 <= row.p_holm:
                text += ", not after Holm's correction"
            text += f" ({row.variant}, {row.cell}; pairs of networks: {row.pairs}){end}"
        sentences.append(f"{model} x{width:g} on {dataset}: {text}.")
    return sentences


def format_mean(mean: float, std: float, digits: int = 2) -> str:
    """Format a mean, for example as '91.20 ± 0.30', or '91.20' if the std is NaN."""
    return f"{mean:.{digits}f}" + ("" if pd.isna(std) else f" ± {std:.{digits}f}")


def format_interval(low: float, high: float) -> str:
    """Format an interval, for example as ' [1.0, 2.0]', or '' if it is NaN."""
    return "" if pd.isna(low) else f" [{low:.1f}, {high:.1f}]"


def cell_name(sparsity: float, rewind: float) -> str:
    """Format a cell, for example as '90%, k=5', or 'all' for a mean over several cells."""
    return "all" if pd.isna(sparsity) else f"{100 * sparsity:.8g}%, k={rewind:g}"
