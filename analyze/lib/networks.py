"""Find the networks and permutations below a folder."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    dense_checkpoints,
    dense_runs,
    find_results,
    root_parser,
    sparse_runs,
    try_read,
    warn_skipped,
    with_settings,
    without_signs_or_fan_in,
)
from common import checkpoint, cli, masking, paths
from common.data import load_cached
from common.errors import UserError
from common.runtime.device import pick_device

IMP = [*NETWORK, "tag", "seed", "sparsity"]
ALIGNMENT = ["method", "match_epoch", *SEEDS]
FLAGS = {
    "points": {"type": cli.number(int, 3), "help": "points per line"},
    "grid": {"type": cli.number(int, 3), "help": "points per side of the plane"},
    "images": {"type": cli.positive, "help": "training images for activation statistics"},
    "width": {"type": float, "help": "width of the cell"},
    "sparsity": {"type": float, "help": "sparsity of the cell"},
    "rewind": {"type": int, "help": "rewind epoch of the cell"},
    "all": {"action": "store_true", "help": "every pair of every cell, not only one"},
}


def parse_args(doc: str, **defaults: Any) -> argparse.Namespace:
    """Parse the command line of an analysis that evaluates networks.

    Arguments are `root` and those of FLAGS that `defaults` names. `load_data(description)` of the
    result opens a data set.
    """
    parser = root_parser(doc)
    for name, default in defaults.items():
        options = FLAGS[name] | {"default": default}
        options["help"] += " (default: %(default)s)" * (default not in (None, False))
        parser.add_argument(f"--{name}", **options)
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    args.load_data = lambda dataset: load_cached(dataset, args.data_dir, device, args.workers)
    return args


def runs_with_dense(root: Path, stage: str, *roles: str) -> Iterator[dict[str, Any]]:
    """Yield every finished run of a stage below `root` with the files of its dense networks.

    A run has its `path`, network, seed and tag, the columns ALIGNMENT, `keep_rounds` and, under
    each of `roles`, the dense checkpoint that its arguments name by digest. Prints one line for a
    run whose dense networks are not below `root` and skips it; skips networks trained elsewhere.
    """
    dense, tags = dense_checkpoints(root), dense_runs(root).set_index("path")["tag"]
    for run in find_results(root, stage):
        arguments = run.get("arguments", {})
        if arguments.get("model_fn"):
            continue  # trained elsewhere: its module cannot be built here
        files = {role: dense.get(arguments.get(role)) for role in roles}
        if missing := [role for role, file in files.items() if file is None]:
            warn_skipped(f"{run['path']}: its {missing[0]} network is not below {root}")
            continue
        trained = checkpoint.load_json(files[roles[-1]].with_name("result.json"))["arguments"]
        row = {key: trained[key] for key in (*NETWORK, "seed")} | {"path": run["path"]}
        row["tag"] = arguments.get("tag") or tags[files[roles[-1]].parent]
        row |= {key: arguments.get(key) for key in (*ALIGNMENT, "keep_rounds")}
        section = "align" if stage == "align_mask" else "imp"
        yield files | row | {f"{section}.{key}": value for key, value in arguments.items()}


def imp_networks(root: Path, rounds: bool) -> pd.DataFrame:
    """Return the networks that IMP pruned below `root`: columns IMP, `dense`, `file`, `rounds`.

    With `rounds` they are those after each round, where these were kept, or else those at the
    requested sparsities. Prints one line for a file that cannot be read and skips it.
    """
    rows = []
    for run in runs_with_dense(root, "prune_imp", "dense"):
        round_files = rounds and run.get("keep_rounds") and paths.round_files(run["path"])
        for sparsity, path in (round_files or paths.imp_files(run["path"])).items():
            if entry := try_read(checkpoint.load, path, ("mask", *checkpoint.WEIGHTS)):
                reached = masking.sparsity(entry["mask"]) if round_files else sparsity
                rows.append(run | {"file": path, "sparsity": reached, "rounds": bool(round_files)})
    columns = [*IMP, "dense", "file", "rounds"]
    table = with_settings(pd.DataFrame(rows)) if rows else pd.DataFrame(columns=columns)
    # An empty table has no dtypes to infer.
    return table[columns].astype({"width": float, "sparsity": float, "seed": int})


def alignments(root: Path) -> pd.DataFrame:
    """Return a row per permuted mask below `root`.

    Its files are `permutation`, `mask`, `source` and `target`. Raises UserError when there is none.
    """
    rows = []
    for run in runs_with_dense(root, "align_mask", "source", "target"):
        for mask in paths.mask_files(run["path"]):
            path = paths.permutation_file(run["path"], mask.name)  # for this mask only
            if not path.is_file():
                path = paths.permutation_file(run["path"])
            run |= {"permutation": path, "mask": mask, "sparsity": paths.sparsity_of(mask)}
            rows.append(run.copy())
    if not rows:
        raise UserError(
            f"no finished alignment with its dense networks below {root}: run align_mask.py, or "
            "pass a folder that has them, too"
        )
    return with_settings(pd.DataFrame(rows))


def triples(root: Path) -> pd.DataFrame:
    """Return the files of LTH, permuted and dense source network with the permutation of the mask.

    A row per cell and pair of seeds, late matches first, has them as `lth`, `permuted`, `dense` and
    `permutation`. The tag of the mask is `mask_tag`: unlike that of the run it has no settings.
    Raises UserError when there is no such row.
    """
    runs, keys = without_signs_or_fan_in(sparse_runs(root)), [*CELL, "source_seed", "tag"]
    lth = runs.loc[runs["arm"] == "lth", [*keys, "path"]].drop_duplicates(keys)
    pairs = runs[runs["arm"] == "permuted"].merge(lth, on=keys, suffixes=("", "_lth"))
    if pairs.empty:
        raise UserError(
            f"no permuted network with an LTH network below {root}: run train_sparse.py for both"
        )
    masks = alignments(root)[["mask", "permutation", "source", "tag"]]
    masks = masks.rename(columns={"source": "dense", "tag": "mask_tag"})
    masks["mask"] = masks["mask"].map(checkpoint.digest)  # sparse runs record the digest
    table = pairs.merge(masks.drop_duplicates("mask", keep="last"), on="mask")
    table["lth"] = table["path_lth"].map(paths.final_file)
    table["permuted"] = table["path"].map(paths.final_file)
    table = table.drop_duplicates([*CELL, *SEEDS, "variant"])  # of several --seed
    return table.sort_values("match_epoch", ascending=False, kind="stable", ignore_index=True)
