"""Finding the networks and permutations below a folder."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    dense_files,
    find_results,
    parse_root,
    plain,
    readable,
    skipped,
    sparse_runs,
)
from common import checkpoint, cli, masking, paths
from common.data import load_cached
from common.errors import UserError
from common.runtime.device import pick_device

PRUNED = [*NETWORK, "tag", "seed", "sparsity"]
ALIGNED = ["method", "match_epoch", *SEEDS]
FLAGS = {
    "points": {"type": cli.number(int, 3), "help": "of a line"},
    "grid": {"type": cli.number(int, 3), "help": "points a side of the plane"},
    "images": {"type": cli.positive, "help": "of the training set for activation statistics"},
    "width": {"type": float, "help": "of the cell"},
    "sparsity": {"type": float, "help": "of the cell"},
    "rewind": {"type": int, "help": "of the cell"},
    "all": {"action": "store_true", "help": "every pair of every cell, not one alone"},
}


def arguments(doc: str, **defaults: Any) -> argparse.Namespace:
    """The command line of an analysis that evaluates networks: `root`, some of FLAGS, and `read`,
    where `read(description)` opens a data set.
    """
    parser = parse_root(doc)
    for name, default in defaults.items():
        how = FLAGS[name] | {"default": default}
        how["help"] += " (default: %(default)s)" * (default is not None)
        parser.add_argument(f"--{name}", **how)
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    args.read = lambda dataset: load_cached(dataset, args.data_dir, device, args.workers)
    return args


def with_dense(root: Path, stage: str, *roles: str) -> Iterator[dict[str, Any]]:
    """What is known of every finished run of a stage below `root`: its `path`, network and tag, how
    it was aligned, and by role the files of the dense weights that it names by digest.

    One whose dense networks are not below `root` is skipped, as are networks trained elsewhere.
    """
    dense = dense_files(root)
    for run in find_results(root, stage):
        arguments = run.get("arguments", {})
        if arguments.get("model_fn"):
            continue  # trained elsewhere: its module is not known here
        files = {role: dense.get(arguments.get(role)) for role in roles}
        if missing := [role for role, file in files.items() if file is None]:
            skipped(f"{run['path']}: its {missing[0]} network is not below {root}")
            continue
        trained = checkpoint.load_json(files[roles[-1]].with_name("result.json"))["arguments"]
        about = {key: trained[key] for key in (*NETWORK, "seed")} | {"path": run["path"]}
        about["tag"] = arguments.get("tag") or trained.get("tag") or ""
        yield files | about | {key: arguments.get(key) for key in (*ALIGNED, "keep_rounds")}


def imp_networks(root: Path, rounds: bool) -> pd.DataFrame:
    """The networks that IMP pruned below `root`: PRUNED, its file and the dense one, `rounds`.

    At the asked sparsities, or with `rounds` after each round of the chains that kept them. One
    that cannot be read is skipped.
    """
    found = []
    for about in with_dense(root, "prune_imp", "dense"):
        kept = rounds and about.get("keep_rounds") and paths.round_files(about["path"])
        for sparsity, path in (kept or paths.imp_files(about["path"])).items():
            if entry := readable(checkpoint.load, path, ("mask", *checkpoint.WEIGHTS)):
                reached = masking.sparsity(entry["mask"]) if kept else sparsity
                found.append(about | {"file": path, "sparsity": reached, "rounds": bool(kept)})
    found = pd.DataFrame(found, columns=[*PRUNED, "dense", "file", "rounds"])
    # An empty table has none of its own.
    return found.astype({"width": float, "sparsity": float, "seed": int})


def alignments(root: Path) -> pd.DataFrame:
    """Every mask that was permuted below `root`, a row each: how, and the files.

    Raises UserError when there is none.
    """
    found = []
    for about in with_dense(root, "align_mask", "source", "target"):
        for mask in paths.mask_files(about["path"]):
            path = paths.permutation_file(about["path"], mask.name)  # of this mask alone
            if not path.is_file():
                path = paths.permutation_file(about["path"])
            about |= {"permutation": path, "mask": mask, "sparsity": paths.sparsity_of(mask)}
            found.append(about.copy())
    if not found:
        raise UserError(f"no finished alignment below {root}: run align_mask.py first")
    return pd.DataFrame(found)


def triples(root: Path) -> pd.DataFrame:
    """Files that belong together: of an lth, a permuted, a dense network, a permutation.

    A row a cell and pair of seeds, late matches first.
    """
    runs, key = plain(sparse_runs(root)), [*CELL, "source_seed", "tag"]
    lth = runs.loc[runs["arm"] == "lth", [*key, "path"]].drop_duplicates(key)
    pairs = runs[runs["arm"] == "permuted"].merge(lth, on=key, suffixes=("", "_lth"))
    if pairs.empty:
        missing = f"no permuted network with LTH's beside it below {root}"
        raise UserError(f"{missing}: run train_sparse.py for both")
    masks = alignments(root)[["mask", "permutation", "source"]]
    masks = masks.rename(columns={"source": "dense"})
    masks["mask"] = masks["mask"].map(checkpoint.digest)  # as sparse runs name it
    found = pairs.merge(masks.drop_duplicates("mask", keep="last"), on="mask")
    found["lth"] = found["path_lth"].map(paths.final_file)
    found["permuted"] = found["path"].map(paths.final_file)
    found = found.drop_duplicates([*CELL, *SEEDS, "variant"])  # of one order
    return found.sort_values("match_epoch", ascending=False, kind="stable", ignore_index=True)
