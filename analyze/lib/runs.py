"""Finding the finished runs below a folder, and reading them into tables."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from common import checkpoint, cli
from common.errors import UserError

COLUMNS = """tag code precision epochs arm signs fan_in model width dataset mask_dataset sparsity
    sparsity_total rewind source_seed target_seed seed method match_epoch test_acc test_loss
    test_top5 diverged mask_code dense_epochs seconds path""".split()
NETWORK = ["model", "width", "dataset"]
CELL = [*NETWORK, "sparsity", "rewind"]
SEEDS = ["source_seed", "target_seed"]
RUN = ["arm", "signs", "fan_in", "mask_dataset", "method", "match_epoch", *SEEDS, "seed", "tag"]
PERMUTED = ("permuted", "random-permutation")
SETTINGS = """epochs lr schedule warmup weight_decay batch_size momentum precision limit_train
    image_size one_shot""".split()


def find_results(root: Path, stage: str) -> list[dict[str, Any]]:
    """Read the result.json of every finished run of `stage` below `root`, each with its `folder`.

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
                found.append(result | {"folder": path.parent})
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped(f"{path}: {type(error).__name__} {error}")
    return found


def read_runs(
    root: Path, stage: str, row: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """`row` of every finished run of `stage` below `root`.

    A run that lacks what it reads is skipped with one line.
    """
    rows = []
    for result in find_results(root, stage):
        try:
            rows.append(row(result))
        except (KeyError, TypeError) as error:
            skipped(result["folder"], f"its result.json lacks {error}")
    return rows


def readable(read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` returns, or None, with one line, where it cannot read a file."""
    try:
        return read(*arguments)
    except UserError as error:
        skipped(error)


def skipped(*why: object) -> None:
    print("skipped", *why, file=sys.stderr)


def sparse_runs(root: Path) -> pd.DataFrame:
    """All finished sparse runs below `root`, a row a run with COLUMNS; accuracy in percent.

    Raises UserError when there is none, and when runs repeat others.
    """
    needed = {*CELL, "arm", "target_seed", "test_acc", "seconds", "sparsity_total"}

    def describe(result: dict[str, Any]) -> dict[str, Any]:
        # The precision asked for stands in the arguments, the one that was used over it.
        row = {key: (result["arguments"] | result).get(key) for key in COLUMNS}
        lacking = needed - {key for key, value in row.items() if value is not None}
        if lacking:
            raise KeyError(*sorted(lacking))
        row |= {"signs": bool(row["signs"]), "fan_in": bool(row["fan_in"])}
        row |= {"tag": row["tag"] or "", "code": row["code"] or "unknown"}
        row["dense_epochs"] = (result.get("dense") or {}).get("epochs")
        row |= {"mask_dataset": row["mask_dataset"] or row["dataset"]}
        method = row["method"] if row["arm"] in PERMUTED else None
        path, made_by = str(result["folder"]), settings(result)
        return row | {"method": method, "path": path, "settings": made_by}

    rows = read_runs(root, "train_sparse", describe)
    if not rows:
        raise UserError(f"no finished sparse run below {root}: run train_sparse.py first")
    runs = pd.DataFrame(rows, columns=COLUMNS)
    runs["tag"] = tags([row["settings"] for row in rows], runs)
    runs = runs.sort_values([*CELL, *RUN], ignore_index=True)
    alike = runs[runs.duplicated([*CELL, *RUN], keep=False)]
    twice = int(runs.duplicated([*CELL, *RUN]).sum())
    two = alike["path"].head(2)
    if twice:  # other hyper-parameters: their mean would be of no experiment
        raise UserError(
            f"{twice} runs below {root} repeat arm, cell and seeds of others, as "
            f"{' and '.join(two)}: keep experiments in folders apart, or run one again with a --tag"
        )
    return runs


def settings(result: dict[str, Any]) -> dict[str, str]:
    """How a sparse run was trained, how its network was before, and how its mask was pruned.

    Nothing of the latter two where an older result does not tell.
    """
    parts = {"": result["arguments"] | result, "dense ": result.get("dense")}
    parts |= {"imp ": result.get("imp")}
    found = {
        f"{prefix}{key}": str(part.get(key))
        for prefix, part in parts.items()
        for key in SETTINGS
        if part
    }
    return found | ({"imp rewind": str(result["imp"].get("rewind"))} if result.get("imp") else {})


def tags(settings: list[dict[str, str]], runs: pd.DataFrame) -> pd.Series:
    """The tag of each run, with the settings in which runs of its network and tag differ.

    So runs of two settings stand in columns of their own, and no mean is of both.
    """
    groups = [runs[key] for key in (*NETWORK, "tag")]
    tag = runs["tag"]
    for key, values in pd.DataFrame(settings, index=runs.index, dtype=object).items():
        mixed = values.groupby(groups).transform("nunique") > 1
        tag = tag + (f" {key}=" + values).where(mixed & values.notna(), "")
    return tag.str.strip()


def dense_runs(root: Path) -> pd.DataFrame:
    """All finished dense runs below `root`: model, width, dataset, seed, tag, test_acc, folder."""
    keys = [*NETWORK, "seed"]

    def describe(result: dict[str, Any]) -> dict[str, Any]:
        row = {key: result["arguments"][key] for key in keys}
        row["tag"] = result["arguments"].get("tag") or ""
        return row | {key: result[key] for key in ("test_acc", "folder")}

    rows = read_runs(root, "train_dense", describe)
    return pd.DataFrame(rows, columns=[*keys, "tag", "test_acc", "folder"])


def dense_files(root: Path) -> dict[str, Path]:
    """The weights that dense runs below `root` kept, by their digest, which later stages record."""
    kept = (path for run in dense_runs(root)["folder"] for path in run.glob("epoch_*.pt"))
    return {checkpoint.digest(path): path for path in kept}


def variant(
    arm: str,
    method: str | None = None,
    epoch: float | None = None,
    mask: str | None = None,
    signs: bool = False,
    fan_in: bool = False,
    tag: str = "",
) -> str:
    """What tables and figures call a run: its arm, and what is unusual about it.

    `epoch` is given of a target matched early, `mask` of the mask of another data set.
    """
    text = arm
    if arm == "permuted" and method not in (None, "activation"):
        text += f" ({method})"
    if pd.notna(epoch):
        text += f" @{epoch:g}"
    if pd.notna(mask):
        text += f" [{mask} mask]"
    text += " + signs" * signs + " + fan-in" * fan_in
    return text + f" [{tag}]" * bool(tag)


def variants(runs: pd.DataFrame) -> pd.Series:
    """The `variant` of each run."""
    epoch = pd.to_numeric(runs["match_epoch"])
    last = epoch.groupby([runs[key] for key in (*NETWORK, "tag")]).transform("max")
    last = pd.to_numeric(runs["dense_epochs"]).fillna(last)
    early, mask = epoch.where(epoch < last), other_mask(runs)  # early: Table 15
    keys = (runs["arm"], runs["method"], early, mask, runs["signs"], runs["fan_in"], runs["tag"])
    return pd.Series(list(map(variant, *keys)), index=runs.index, dtype=object)


def other_mask(runs: pd.DataFrame) -> pd.Series:
    """The data set of each run's mask where it is another than the run's."""
    return runs["mask_dataset"].where(runs["mask_dataset"] != runs["dataset"])


def of_one_network(runs: pd.DataFrame) -> pd.Series:
    """Whether a run has the weights and the mask of one network, as LTH has."""
    return (runs["source_seed"] == runs["target_seed"]) & other_mask(runs).isna()


def baselines(runs: pd.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """For every variant, the (naive, lth) that it can be compared with, the better ones first.

    The naive use of masks of the same data set, of the same tag, and else without a tag.
    """
    keys = zip(variants(runs), other_mask(runs), runs["tag"])
    return {
        name: [(variant("naive", mask=mask, tag=t), variant("lth", tag=t)) for t in (tag, "")]
        for name, mask, tag in dict.fromkeys(keys)
    }


def by_pair(runs: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by cell and pair of seeds (source, target), a column a variant.

    LTH and other runs of one network stand beside every pair with that source; imp-target beside
    that target.
    """
    runs = runs.assign(variant=variants(runs))
    single = of_one_network(runs)
    pairs = runs.loc[~single, [*CELL, *SEEDS]].drop_duplicates()
    side = runs["arm"].map({"imp-target": "target_seed"}).fillna("source_seed")
    parts = [runs[~single]]
    for key, other in (SEEDS, SEEDS[::-1]):
        alone = runs[single & (side == key)].drop(columns=other)
        parts.append(alone.merge(pairs, on=[*CELL, key]))
    return pd.concat(parts).pivot_table("test_acc", [*CELL, *SEEDS], "variant")


def shared_networks(pairs: pd.DataFrame) -> list[int]:
    """The seeds of networks that several pairs share, by columns source_seed and target_seed."""
    different = set(pairs[SEEDS].itertuples(index=False, name=None))
    counts = Counter(seed for pair in different for seed in set(pair))
    return sorted(seed for seed, count in counts.items() if count > 1)


def remarks(runs: pd.DataFrame) -> list[str]:
    """Lines for below a table of `runs`: other code, divergence, pairs that share networks."""
    lines, lost = [], runs[runs["diverged"].notna()]
    if shared := shared_networks(runs[~of_one_network(runs)]):
        names = f"seed{'s' * (len(shared) > 1)} {', '.join(map(str, shared))}"
        lines.append(f"pairs share networks ({names}) and are not independent: no intervals")
    if runs["code"].nunique() > 1:
        lines.append(f"these runs were made by different code: {_counts(runs, 'code')}")
    if runs.groupby("tag")["mask_code"].nunique().max() > 1:
        lines.append(f"their masks were pruned by different code: {_counts(runs, 'mask_code')}")
    if len(lost):
        names = ", ".join(f"{run.path} in epoch {run.diverged:.0f}" for run in lost.itertuples())
        lines.append(f"{len(lost)} of {len(runs)} runs diverged, and count as they ended: {names}")
    return lines


def _counts(runs: pd.DataFrame, key: str) -> str:
    """'abc (12 runs), def [adamw] (6 runs)': how many runs there are of each code and tag."""
    counts = runs.fillna({key: "unknown"}).groupby([key, "tag"]).size().items()
    return ", ".join(f"{code}{f' [{tag}]' * bool(tag)} ({n} runs)" for (code, tag), n in counts)


def parse_root(doc: str) -> argparse.ArgumentParser:
    parser = cli.Parser(doc)
    parser.add_argument("root", type=Path, help="folder of runs")
    return parser
