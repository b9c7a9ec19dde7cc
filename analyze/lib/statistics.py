"""Statistics over seeds: means, and differences to naive, paired by seeds."""

import math

import numpy as np
import pandas as pd
from scipy.special import nctdtrinc, stdtr, stdtrit  # scipy.stats takes a second to import

from analyze.lib.runs import CELL, KIND, NETWORK, SEEDS, by_pair, shared_networks, with_gains

PAIRED = "difference difference_se difference_low difference_high p detectable pairs".split()
DIFFERENCES = [*PAIRED, "p_holm", "gap_closed", "gap_low", "gap_high"]


def paired(differences: pd.Series, independent: bool = True) -> dict[str, float]:
    """Of the differences of pairs: mean, standard error, 95% interval and p (Student), and what
    they could have shown: the true difference that would have been significant with a
    probability of 80% (noncentral t).

    Of one pair, of pairs that are not independent, and of differences that are all the same, as two
    pairs' easily are, the mean alone: there is no spread to judge it by.
    """
    count, mean = len(differences), differences.mean()
    told = independent and count > 1 and np.ptp(differences) > 1e-9
    error = differences.sem() if told else math.nan
    t = stdtrit(max(count - 1, 1), 0.975)
    p = 2 * stdtr(count - 1, -abs(mean) / error)
    detectable = error * nctdtrinc(max(count - 1, 1), 0.2, t)
    return dict(
        zip(PAIRED, (mean, error, mean - t * error, mean + t * error, p, detectable, count))
    )


def holm(p: pd.Series) -> pd.Series:
    """The p values of a family of tests, corrected by Holm (1979)."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def differences(pairs: pd.DataFrame) -> dict[str, float]:
    """Of a variant's rows of `with_gains`: the gain as `paired`, and the share of the gap closed.

    The share is in percent, of means over the pairs, with its 95% interval; it is missing where
    there is no gap, or a pair lacks it. Intervals are missing where pairs share a network, as such
    pairs are not independent.
    """
    independent = not shared_networks(pairs)
    row = paired(pairs["gain"], independent)
    gain, gap = pairs["gain"], pairs["gap"]
    if gap.mean(skipna=False) > 0:
        ends = ratio_interval(gain, gap) if independent else (math.nan, math.nan)
        shares = 100 * np.array([gain.mean() / gap.mean(), *ends])
        row |= dict(zip(("gap_closed", "gap_low", "gap_high"), shares))
    return row


def ratio_interval(numerators: pd.Series, denominators: pd.Series) -> tuple[float, float]:
    """The 95% interval of the ratio of two paired means (Fieller 1954).

    Missing for a single pair, and where the mean denominator cannot be distinguished from zero.
    """
    count, n, d = len(numerators), numerators.mean(), denominators.mean()
    if count < 2:
        return math.nan, math.nan
    (nn, nd), (_, dd) = stdtrit(count - 1, 0.975) ** 2 * np.cov(numerators, denominators) / count
    if d**2 <= dd:
        return math.nan, math.nan
    # At its ends r the t test of numerator - r * denominator is just at 5%.
    low, high = np.sort(np.roots([d**2 - dd, 2 * (nd - n * d), n**2 - nn]).real)
    return low, high


def accuracy(cell: pd.DataFrame) -> pd.DataFrame:
    """Of a cell's runs, by arm and variant: mean, sample std and number."""
    return cell.groupby(["arm", "variant"])["test_acc"].agg(["mean", "std", "count"])


def overall(pairs: pd.DataFrame) -> pd.DataFrame:
    """The accuracies of rows of `with_gains` by pair, as means over the cells of a network.

    Of networks with several cells that compare something, of the variants that all of these cells
    have: each pair's mean over those in which it has them all.
    """
    told = pairs[pairs.groupby(CELL)["gain"].transform("count") > 0].copy()
    told["cell"] = told.groupby(CELL).ngroup()
    cells = told.groupby(NETWORK)["cell"].transform("nunique")
    mine = told.groupby([*NETWORK, "variant"])["cell"].transform("nunique")
    told = told[(cells > 1) & (mine == cells)]
    variants = told.groupby(NETWORK)["variant"].transform("nunique")
    whole = told.groupby([*CELL, *SEEDS])["variant"].transform("nunique") == variants
    return told[whole].groupby([*NETWORK, *SEEDS, *KIND], as_index=False)["test_acc"].mean()


def summary(runs: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """A row a cell and variant: mean, sample std and number of runs, and its `differences`.

    The rows of `overall` have no sparsity and rewind epoch. Holm's family are all rows of a
    network. `against` is a variant in place of naive.
    """
    pairs, key = by_pair(runs), [*CELL, "arm", "variant"]
    means = overall(with_gains(pairs, against))
    cells = pd.concat([runs, means]).groupby(CELL, dropna=False)[[*key[-2:], "test_acc"]]
    table = cells.apply(accuracy).reset_index()
    told = with_gains(pd.concat([pairs, means]), against).dropna(subset="gain")
    groups = told.groupby(key, dropna=False)
    rows = [dict(zip(key, names)) | differences(group) for names, group in groups]
    found = pd.DataFrame(rows, columns=[*key, *DIFFERENCES]).astype(table.dtypes[key])
    table = table.merge(found, "left", key)
    table["cell"] = list(map(cell_name, table["sparsity"], table["rewind"]))
    table["p_holm"] = table.groupby(NETWORK)["p"].transform(holm)
    return table.astype({"rewind": "Int64", "count": int, "pairs": "Int64"})


def findings(table: pd.DataFrame) -> list[str]:
    """What the rows of `summary` say of the permuted mask, in a sentence a network."""
    sentences = []
    for (model, width, dataset), rows in table.groupby(NETWORK):
        rows = rows[(rows["arm"] == "permuted") & rows["difference"].notna()]
        rows = rows.sort_values("sparsity", na_position="first", kind="stable")
        text = "no permuted mask stands beside an unpermuted one yet"
        for row in rows.head(1).itertuples():
            text, shown = "whether permuting the mask helps cannot be told from these runs", ""
            between = interval(row.difference_low, row.difference_high)
            if row.difference_low * row.difference_high > 0:
                text = f"permuting the mask {'helps' if row.difference > 0 else 'hurts'}"
                if of_gap := interval(row.gap_low, row.gap_high):
                    shown = f"; that is {row.gap_closed:.0f}%{of_gap} of the gap to the mask's own"
                    shown += " network"
            elif between:
                shown = f"; so many can show a difference of {row.detectable:.1f} points"
            text += f": {row.difference:+.1f} points of test accuracy over the unpermuted mask"
            if between:
                text += f", 95% interval{between}"
            if row.p < 0.05 <= row.p_holm:
                text += ", not after Holm's correction"
            text += f" ({row.variant}, {row.cell}; pairs of networks: {row.pairs}){shown}"
        sentences.append(f"{model} x{width:g} on {dataset}: {text}.")
    return sentences


def plus_minus(mean: float, std: float, digits: int = 2) -> str:
    """For example '91.20 ± 0.30'; a single run has no spread."""
    return f"{mean:.{digits}f}" + ("" if pd.isna(std) else f" ± {std:.{digits}f}")


def interval(low: float, high: float) -> str:
    """For example ' [1.0, 2.0]', or nothing where there is none."""
    return "" if pd.isna(low) else f" [{low:.1f}, {high:.1f}]"


def cell_name(sparsity: float, rewind: float) -> str:
    """For example '90%, k=5'; 'all' of a row of `summary` over several cells."""
    return "all" if pd.isna(sparsity) else f"{100 * sparsity:.8g}%, k={rewind:g}"
