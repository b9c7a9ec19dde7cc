"""Find the finished runs below a folder and read them into tables."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from common import checkpoint, cli
from common.errors import UserError

COLUMNS = """tag code precision epochs arm signs fan_in model width dataset mask_dataset sparsity
    sparsity_total rewind source_seed target_seed seed method match_epoch test_acc test_loss
    test_top5 diverged mask_code dense_epochs seconds path variant""".split()
NETWORK = ["model", "width", "dataset"]
CELL = [*NETWORK, "sparsity", "rewind"]
SEEDS = ["source_seed", "target_seed"]
VARIANT = ["arm", "tag", "mask_dataset", "signs", "fan_in", "variant"]
RUN = ["arm", "signs", "fan_in", "mask_dataset", "method", "match_epoch", *SEEDS, "seed", "tag"]
REQUIRED = [*CELL, "arm", *SEEDS, "seed", "epochs", "test_acc", "seconds", "sparsity_total"]
INTEGERS = {"rewind", *SEEDS, "seed", "epochs"}
STRINGS = (
    "tag code precision arm model dataset mask_dataset method mask_code mask path variant".split()
)
# Every argument of a stage that is not listed here is a setting, including those added later.
NOT_SETTINGS = {*CELL[:-1], *RUN, "save_epochs", "keep_rounds", "data_dir", "dense"}
NOT_SETTINGS |= {"source", "target", "weights", "mask", "model_fn", "arguments.rewind"}
SECTIONS = ("arguments", "dense", "imp", "align")  # of result.json that hold settings


def find_results(root: Path, stage: str) -> list[dict[str, Any]]:
    """Read the result.json of every finished run of `stage` below `root`, in path order.

    Each result has the folder of its run as `path`. Prints one line for a file that cannot be read
    and skips it. Raises UserError when `root` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    results = []
    for path in sorted(root.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            if result["stage"] == stage:
                results.append(result | {"path": path.parent})
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warn_skipped(f"{path}: {type(error).__name__} {error}")
    return results


def read_runs(
    roots: Sequence[Path], stage: str, required: list[str], **comparison: Any
) -> pd.DataFrame:
    """Read the finished runs of `stage` below `roots`: a row per run, with COLUMNS and `mask`.

    Values come from the arguments and, with precedence, from the results, so that `precision` is
    the one that was used. `comparison` is passed on to `with_settings`. Prints one line for a run
    that lacks a required value and skips it.
    """
    results = pd.json_normalize([result for root in roots for result in find_results(root, stage)])
    args = results.filter(regex=r"^arguments\.").rename(columns=lambda key: key.partition(".")[2])
    runs = results.combine_first(args)
    runs = runs.reindex(columns=[*dict.fromkeys([*COLUMNS, "mask", "checksum", *runs])])
    used = {"arguments.precision": runs["precision"], "arguments.checksum": runs["checksum"]}
    runs = runs.assign(**used, dense_epochs=runs.get("dense.epochs"))
    numeric = [key for key in COLUMNS if key not in STRINGS]
    runs[numeric] = runs[numeric].apply(pd.to_numeric, errors="coerce").astype(float)
    runs[STRINGS] = runs[STRINGS].map(lambda value: None if isinstance(value, list) else value)
    missing = runs[required].isna()
    for path, is_missing in zip(runs["path"], missing.to_numpy()):
        if is_missing.any():
            warn_skipped(path, f"its result.json lacks {', '.join(missing.columns[is_missing])}")
    runs = runs[~missing.any(axis=1)]
    runs = runs.astype(dict.fromkeys(STRINGS, object) | dict.fromkeys(INTEGERS & {*required}, int))
    return with_settings(runs, **comparison)[[*COLUMNS, "mask"]]


def try_read(read: Callable[..., Any], *arguments: Any) -> Any:
    """Return `read(*arguments)`, or print one line and return None if it raises UserError."""
    try:
        return read(*arguments)
    except UserError as error:
        warn_skipped(error)


def warn_skipped(*reason: object) -> None:
    print("skipped", *reason, file=sys.stderr)


def sparse_runs(*roots: Path, **comparison: Any) -> pd.DataFrame:
    """Return all finished sparse runs below `roots`, a row per run: COLUMNS and `mask`.

    Accuracies are in percent. `comparison` is passed on to `with_settings`. Raises UserError when
    there is no run, and when two runs differ in nothing that identifies a run.
    """
    runs = read_runs(roots, "train_sparse", REQUIRED, **comparison)
    if runs.empty:
        folders = ", ".join(map(str, roots))
        raise UserError(f"no finished sparse run below {folders}: run train_sparse.py first")
    runs[["signs", "fan_in"]] = runs[["signs", "fan_in"]].eq(True)
    runs["code"] = runs["code"].fillna("unknown")
    runs["mask_dataset"] = runs["mask_dataset"].fillna(runs["dataset"])
    runs["method"] = runs["method"].where(runs["arm"].isin(["permuted", "random-permutation"]))
    runs["variant"] = variant_names(runs)
    runs = runs.sort_values([*CELL, *RUN], ignore_index=True)
    check_unique(runs, [*CELL, *RUN, "dense_epochs"])
    return runs


def check_unique(table: pd.DataFrame, keys: list[str], file: str = "path") -> None:
    """Raise UserError, naming two files, if rows of `table` agree in all `keys`."""
    files = table.groupby(keys, dropna=False, sort=False)[file].agg(list)
    duplicates = files[files.map(len) > 1]
    if len(duplicates):
        first, second, *_ = duplicates.iloc[0]
        raise UserError(
            f"{first} and {second} have the same settings and seeds ({len(duplicates)} such groups "
            "in all): keep experiments in separate folders, or rerun one with --tag"
        )


def dense_runs(root: Path) -> pd.DataFrame:
    """Return all finished dense runs below `root`: COLUMNS, as far as they apply; variant dense."""
    runs = read_runs([root], "train_dense", [*NETWORK, "seed", "epochs", "test_acc"])
    return runs.assign(variant=with_tag("dense", runs["tag"]))


def with_settings(
    runs: pd.DataFrame, group: list[str] = NETWORK, ignored: Iterable[str] = ()
) -> pd.DataFrame:
    """Add the settings in which runs of the same tag and `group` differ to their tag.

    Settings of the alignment, which naive runs lack, are added to the method instead. Runs with
    different settings then have columns of their own in a table and are never averaged. Settings
    with a name in `ignored` may differ.
    """
    runs = runs.assign(tag=runs["tag"].fillna(""))
    keys = [runs[key] for key in (*group, "tag")]
    groups = dict.fromkeys(SECTIONS, keys) | {"align": [*keys, runs["method"]]}
    for key in runs.filter(regex=rf"^({'|'.join(SECTIONS)})\."):
        section, name = key.split(".", 1)
        if {key, name} & {*NOT_SETTINGS, *ignored}:
            continue
        has_section = runs.filter(like=f"{section}.").notna().any(axis=1)  # not in older results
        unset = "False" if runs[key].map(type).eq(bool).any() else "None"  # a flag added later
        values = runs[key].map(format_setting, na_action="ignore").astype(object).fillna(unset)
        differs = values.where(has_section).groupby(groups[section]).transform("nunique") > 1
        if differs.any():
            label = key.removeprefix("arguments.").removeprefix("align.").replace(".", " ")
            column = "method" if section == "align" else "tag"
            runs[column] += (f" {label}=" + values).where(differs & has_section, "")
    return runs.assign(tag=runs["tag"].str.strip())


def format_setting(value: Any) -> str:
    """Format a setting; integers without a decimal point, as missing values make them floats."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def dense_checkpoints(root: Path) -> dict[str, Path]:
    """Return the checkpoints of dense runs below `root` by the digest that later stages record."""
    files = (path for run in dense_runs(root)["path"] for path in run.glob("epoch_*.pt"))
    return {checkpoint.digest(path): path for path in files}


def with_tag(name: Any, tag: pd.Series) -> pd.Series:
    """Append tags in brackets to `name`, a string or a series."""
    return name + (" [" + tag + "]").where(tag != "", "")


def variant_names(runs: pd.DataFrame) -> pd.Series:
    """Return the name of each run in tables and figures: its arm and every non-default option."""
    early = runs["match_epoch"].mask(runs["match_epoch"] == runs["dense_epochs"])  # Table 15
    parts = {
        " ({})": runs["method"].mask(runs["method"].isin(["activation", "random"])),
        " @{:g}": early,
        " [{} mask]": foreign_mask_dataset(runs),
        " + signs": runs["signs"].where(runs["signs"]),
        " + fan-in": runs["fan_in"].where(runs["fan_in"]),
    }
    name = runs["arm"].replace("lth", "LTH")
    for text, values in parts.items():
        name = name + ["" if pd.isna(value) else text.format(value) for value in values]
    return with_tag(name, runs["tag"])


def foreign_mask_dataset(runs: pd.DataFrame) -> pd.Series:
    """Return the data set of each run's mask, or NaN where it is the data set of the run."""
    return runs["mask_dataset"].where(runs["mask_dataset"] != runs["dataset"])


def without_signs_or_fan_in(runs: pd.DataFrame) -> pd.DataFrame:
    """Drop the runs with transferred signs or fan-in rescaling."""
    return runs[~runs["signs"] & ~runs["fan_in"]]


def has_own_mask(runs: pd.DataFrame) -> pd.Series:
    """Return whether each run's weights and mask are from the same network, as for LTH."""
    return (runs["source_seed"] == runs["target_seed"]) & foreign_mask_dataset(runs).isna()


def accuracy_by_pair(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy of every variant, a row per cell and pair of seeds (source, target).

    LTH, and every other run with its own mask, is repeated for all pairs with that source;
    imp-target for all pairs with that target.
    """
    own_mask, of_target = has_own_mask(runs), runs["arm"] == "imp-target"
    pairs = runs.loc[~own_mask, [*CELL, *SEEDS]].drop_duplicates()
    parts = [runs[~own_mask]]
    for seed, other, chosen in ((*SEEDS, ~of_target), (*SEEDS[::-1], of_target)):
        parts.append(runs[own_mask & chosen].drop(columns=other).merge(pairs, on=[*CELL, seed]))
    return pd.concat(parts).groupby([*CELL, *SEEDS, *VARIANT], as_index=False)["test_acc"].mean()


def with_gains(pairs: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Add `gain`, over naive in points, and `gap`, LTH minus naive, to rows of `accuracy_by_pair`.

    Naive and LTH are those of the same cell, pair, tag and data set of the mask. With `against`,
    gains are over that variant instead, and the gap is missing.
    """
    keys = [*CELL, *SEEDS, "tag", "mask_dataset"]
    naive, lth = (without_signs_or_fan_in(pairs[pairs["arm"] == arm]) for arm in ("naive", "lth"))
    if against:
        naive, keys, lth = pairs[pairs["variant"] == against], [*CELL, *SEEDS], lth[:0]
    naive = naive.rename(columns={"test_acc": "naive", "variant": "baseline"})
    lth = lth.rename(columns={"test_acc": "lth"})
    table = pairs.merge(naive[[*keys, "naive", "baseline"]], "left", keys)
    table = table.merge(lth[[*keys, "lth"]], "left", keys)
    gain = (table["test_acc"] - table["naive"]).where(table["variant"] != table["baseline"])
    return table.assign(gain=gain, gap=table["lth"] - table["naive"])


def shared_networks(pairs: pd.DataFrame) -> list[int]:
    """Return the seeds that occur in several pairs (columns source_seed and target_seed)."""
    unique = pairs[SEEDS].drop_duplicates()
    same_seed = unique["source_seed"] == unique["target_seed"]
    seeds = pd.concat([unique["source_seed"], unique.loc[~same_seed, "target_seed"]])
    return sorted(seeds[seeds.duplicated()].unique())


def caveats(runs: pd.DataFrame) -> list[str]:
    """Return the lines to print below a table of `runs`.

    They name pairs that share networks, sparsities over different layers, different code and
    diverged runs.
    """
    lines, diverged = [], runs[runs["diverged"].notna()]
    compared = runs[~has_own_mask(runs)].groupby([*CELL, "variant"])
    if shared := {seed for _, pairs in compared for seed in shared_networks(pairs)}:
        seeds = ", ".join(map(str, sorted(shared)))
        lines.append(f"pairs share networks (seed {seeds}) and are not independent: no intervals")
    for (*_, sparsity), cell in runs.groupby([*NETWORK, "sparsity"]):
        totals = cell.groupby(cell["sparsity_total"].map("{:.1%}".format))["variant"].unique()
        if len(totals) > 1:
            parts = (f"{total} ({', '.join(names)})" for total, names in totals.items())
            lines.append(
                f"at {sparsity:g} other layers are pruned, of all weights {', '.join(parts)}"
            )
    for key, text in (("code", "these runs were made"), ("mask_code", "their masks were pruned")):
        codes = runs[key].fillna("unknown")
        if codes.groupby(runs["tag"]).nunique().max() > 1:  # a tag marks an intended edit
            groups = runs.groupby(codes, sort=False)["variant"].unique()
            parts = (f"{code} ({', '.join(names)})" for code, names in groups.items())
            lines.append(f"{text} by different code: {', '.join(parts)}")
    if len(diverged):
        names = ", ".join(
            f"{run.path} in epoch {run.diverged:.0f}" for run in diverged.itertuples()
        )
        lines.append(
            f"{len(diverged)} of {len(runs)} runs diverged, and count as they ended: {names}"
        )
    return lines


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV and print its path."""
    checkpoint.save_text(table.to_csv(index=False), path)
    print(f"wrote {path}")


def root_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser of the argument `root`, the folder of runs, described by `doc`."""
    parser = cli.Parser(doc)
    parser.add_argument("root", type=Path, help="folder of runs")
    return parser
