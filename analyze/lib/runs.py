"""Finding the finished runs below a folder, and reading them into tables."""

import argparse
import json
import sys
from collections.abc import Callable
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
KIND = ["arm", "tag", "mask_dataset", "signs", "fan_in", "variant"]
RUN = ["arm", "signs", "fan_in", "mask_dataset", "method", "match_epoch", *SEEDS, "seed", "tag"]
NEEDED = [*CELL, "arm", *SEEDS, "seed", "epochs", "test_acc", "seconds", "sparsity_total"]
WHOLE = {"rewind", *SEEDS, "seed", "epochs"}
WORDS = (
    "tag code precision arm model dataset mask_dataset method mask_code mask path variant".split()
)
# What else stands among the arguments of a stage: all others are settings, one that is added, too.
NO_SETTINGS = {*CELL[:-1], *RUN, "save_epochs", "keep_rounds", "data_dir", "dense"}
NO_SETTINGS |= {"source", "target", "weights", "mask", "model_fn", "arguments.rewind"}
PARTS = ("arguments", "dense", "imp", "align")  # of a result: they hold settings


def find_results(root: Path, stage: str) -> list[dict[str, Any]]:
    """Read the result.json of every finished run of `stage` below `root`, each with its folder as
    `path`.

    In path order. A file that cannot be read is skipped with one line. Raises UserError when
    `root` is no folder.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    found = []
    for path in sorted(root.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            if result["stage"] == stage:
                found.append(result | {"path": path.parent})
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            skipped(f"{path}: {type(error).__name__} {error}")
    return found


def read_runs(root: Path, stage: str, needed: list[str]) -> pd.DataFrame:
    """A row a finished run of `stage` below `root`: COLUMNS and `mask`, of arguments and results.

    The precision asked for stands in the arguments, the one that was used over it. A run that lacks
    what is needed is skipped with one line.
    """
    found = pd.json_normalize(find_results(root, stage))
    asked = found.filter(regex=r"^arguments\.").rename(columns=lambda key: key.partition(".")[2])
    runs = found.combine_first(asked)
    runs = runs.reindex(columns=[*dict.fromkeys([*COLUMNS, "mask", "checksum", *runs])])
    used = {"arguments.precision": runs["precision"], "arguments.checksum": runs["checksum"]}
    runs = runs.assign(**used, dense_epochs=runs.get("dense.epochs"))
    numbers = [key for key in COLUMNS if key not in WORDS]
    runs[numbers] = runs[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    runs[WORDS] = runs[WORDS].map(lambda value: None if isinstance(value, list) else value)
    lacking = runs[needed].isna()
    for path, lacks in zip(runs["path"], lacking.to_numpy()):
        if lacks.any():
            skipped(path, f"its result.json lacks {', '.join(lacking.columns[lacks])}")
    runs = runs[~lacking.any(axis=1)]
    runs = runs.astype(dict.fromkeys(WORDS, object) | dict.fromkeys(WHOLE & {*needed}, int))
    return with_settings(runs)[[*COLUMNS, "mask"]]


def readable(read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` returns, or None, with one line, where it cannot read a file."""
    try:
        return read(*arguments)
    except UserError as error:
        skipped(error)


def skipped(*why: object) -> None:
    print("skipped", *why, file=sys.stderr)


def sparse_runs(root: Path) -> pd.DataFrame:
    """All finished sparse runs below `root`, a row a run: COLUMNS and `mask`; percent.

    Raises UserError when there is none, and when runs repeat others.
    """
    runs = read_runs(root, "train_sparse", NEEDED)
    if runs.empty:
        raise UserError(f"no finished sparse run below {root}: run train_sparse.py first")
    runs[["signs", "fan_in"]] = runs[["signs", "fan_in"]].eq(True)
    runs["code"] = runs["code"].fillna("unknown")
    runs["mask_dataset"] = runs["mask_dataset"].fillna(runs["dataset"])
    runs["method"] = runs["method"].where(runs["arm"].isin(["permuted", "random-permutation"]))
    runs["variant"] = variants(runs)
    runs = runs.sort_values([*CELL, *RUN], ignore_index=True)
    refuse_repeats(runs, [*CELL, *RUN])
    return runs


def refuse_repeats(table: pd.DataFrame, keys: list[str], file: str = "path") -> None:
    """Raise UserError where rows of a table agree in all keys: which of them counts?"""
    files = table.groupby(keys, dropna=False, sort=False)[file].agg(list)
    repeated = files[files.map(len) > 1]
    if len(repeated):
        one, other, *_ = repeated.iloc[0]
        raise UserError(
            f"{one} and {other} are of the same kind and seeds ({len(repeated)} such groups in "
            "all): keep experiments in folders apart, or run one again with a --tag"
        )


def dense_runs(root: Path) -> pd.DataFrame:
    """All finished dense runs below `root`: those of COLUMNS that they have; variant is dense."""
    needed = [*NETWORK, "seed", "epochs", "test_acc"]
    runs = read_runs(root, "train_dense", needed)
    return runs.assign(variant=with_tag("dense", runs["tag"]))


def with_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, with the settings in which runs of a network and tag differ in their tag, and those
    of the alignment, which naive has not, in their method.

    So runs of two settings stand in columns of their own, and no mean is of both.
    """
    runs = runs.assign(tag=runs["tag"].fillna(""))
    alike = [runs[key] for key in (*NETWORK, "tag")]
    groups = dict.fromkeys(PARTS, alike) | {"align": [*alike, runs["method"]]}
    for key in runs.filter(regex=rf"^({'|'.join(PARTS)})\."):
        part, name = key.split(".", 1)
        if {key, name} & NO_SETTINGS:
            continue
        told = runs.filter(like=f"{part}.").notna().any(axis=1)  # older results tell less
        values = runs[key].map(text_of, na_action="ignore").astype(object).fillna("None")
        mixed = values.where(told).groupby(groups[part]).transform("nunique") > 1
        if mixed.any():
            label = key.removeprefix("arguments.").removeprefix("align.").replace(".", " ")
            place = "method" if part == "align" else "tag"
            runs[place] += (f" {label}=" + values).where(mixed & told, "")
    return runs.assign(tag=runs["tag"].str.strip())


def text_of(setting: Any) -> str:
    """A whole number is a float where not all runs have it."""
    return f"{setting:.12g}" if isinstance(setting, float) else str(setting)


def dense_files(root: Path) -> dict[str, Path]:
    """The weights that dense runs below `root` kept, by their digest, which later stages record."""
    kept = (path for run in dense_runs(root)["path"] for path in run.glob("epoch_*.pt"))
    return {checkpoint.digest(path): path for path in kept}


def with_tag(name: Any, tag: pd.Series) -> pd.Series:
    """What tables and figures call runs: `name`, one or one a run, and the tag."""
    return name + (" [" + tag + "]").where(tag != "", "")


def variants(runs: pd.DataFrame) -> pd.Series:
    """What tables and figures call each run: its arm, and what is unusual about it."""
    early = runs["match_epoch"].mask(runs["match_epoch"] == runs["dense_epochs"])  # Table 15
    parts = {
        " ({})": runs["method"].mask(runs["method"].isin(["activation", "random"])),
        " @{:g}": early,
        " [{} mask]": other_mask(runs),
        " + signs": runs["signs"].where(runs["signs"]),
        " + fan-in": runs["fan_in"].where(runs["fan_in"]),
    }
    name = runs["arm"].replace("lth", "LTH")
    for text, values in parts.items():
        name = name + ["" if pd.isna(value) else text.format(value) for value in values]
    return with_tag(name, runs["tag"])


def other_mask(runs: pd.DataFrame) -> pd.Series:
    """The data set of each run's mask where it is another than the run's."""
    return runs["mask_dataset"].where(runs["mask_dataset"] != runs["dataset"])


def plain(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs without signs and rescaling."""
    return runs[~runs["signs"] & ~runs["fan_in"]]


def of_one_network(runs: pd.DataFrame) -> pd.Series:
    """Whether a run has the weights and the mask of one network, as LTH has."""
    return (runs["source_seed"] == runs["target_seed"]) & other_mask(runs).isna()


def by_pair(runs: pd.DataFrame) -> pd.DataFrame:
    """The accuracy of every variant by cell and pair of seeds (source, target), a row each.

    LTH and other runs of one network stand beside every pair with that source; imp-target beside
    that target.
    """
    single, of_target = of_one_network(runs), runs["arm"] == "imp-target"
    pairs = runs.loc[~single, [*CELL, *SEEDS]].drop_duplicates()
    parts = [runs[~single]]
    for key, other, alone in ((*SEEDS, ~of_target), (*SEEDS[::-1], of_target)):
        parts.append(runs[single & alone].drop(columns=other).merge(pairs, on=[*CELL, key]))
    return pd.concat(parts).groupby([*CELL, *SEEDS, *KIND], as_index=False)["test_acc"].mean()


def with_gains(pairs: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Rows of `by_pair` with their `gain` over naive in points, and the `gap` from naive to LTH.

    In the same cell, of the same pair, tag and data set of the mask. The gain is over the variant
    `against`, where one is given, and there is no gap then.
    """
    alike = [*CELL, *SEEDS, "tag", "mask_dataset"]
    naive, lth = (plain(pairs[pairs["arm"] == arm]) for arm in ("naive", "lth"))
    if against:
        naive, alike, lth = pairs[pairs["variant"] == against], [*CELL, *SEEDS], lth[:0]
    naive = naive.rename(columns={"test_acc": "naive", "variant": "baseline"})
    lth = lth.rename(columns={"test_acc": "lth"})
    found = pairs.merge(naive[[*alike, "naive", "baseline"]], "left", alike)
    found = found.merge(lth[[*alike, "lth"]], "left", alike)
    gain = (found["test_acc"] - found["naive"]).where(found["variant"] != found["baseline"])
    return found.assign(gain=gain, gap=found["lth"] - found["naive"])


def shared_networks(pairs: pd.DataFrame) -> list[int]:
    """The seeds of networks that several pairs share, by columns source_seed and target_seed."""
    different = pairs[SEEDS].drop_duplicates()
    of_one = different["source_seed"] == different["target_seed"]
    seeds = pd.concat([different["source_seed"], different.loc[~of_one, "target_seed"]])
    return sorted(seeds[seeds.duplicated()].unique())


def remarks(runs: pd.DataFrame) -> list[str]:
    """Lines for below a table of `runs`: pairs that share networks, other layers pruned, other
    code, divergence.
    """
    lines, lost = [], runs[runs["diverged"].notna()]
    if shared := shared_networks(runs[~of_one_network(runs)]):
        seeds = ", ".join(map(str, shared))
        lines.append(f"pairs share networks (seed {seeds}) and are not independent: no intervals")
    for sparsity, cell in runs.groupby("sparsity"):
        of_all = cell.groupby(cell["sparsity_total"].map("{:.1%}".format))["variant"].unique()
        if len(of_all) > 1:
            shares = (f"{share} ({', '.join(names)})" for share, names in of_all.items())
            lines.append(
                f"at {sparsity:g} other layers are pruned, of all weights {', '.join(shares)}"
            )
    for key, what in (("code", "these runs were made"), ("mask_code", "their masks were pruned")):
        known = runs[key].fillna("unknown")
        if known.groupby(runs["tag"]).nunique().max() > 1:  # an edit is other code by intent
            groups = runs.groupby(known, sort=False)["variant"].unique()
            codes = (f"{code} ({', '.join(names)})" for code, names in groups.items())
            lines.append(f"{what} by different code: {', '.join(codes)}")
    if len(lost):
        names = ", ".join(f"{run.path} in epoch {run.diverged:.0f}" for run in lost.itertuples())
        lines.append(f"{len(lost)} of {len(runs)} runs diverged, and count as they ended: {names}")
    return lines


def save(table: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV, and say so."""
    checkpoint.save_text(table.to_csv(index=False), path)
    print(f"wrote {path}")


def parse_root(doc: str) -> argparse.ArgumentParser:
    parser = cli.Parser(doc)
    parser.add_argument("root", type=Path, help="folder of runs")
    return parser
