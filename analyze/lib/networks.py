"""Networks and permutations below a folder: finding them, and building them to be evaluated."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    dense_files,
    find_results,
    parse_root,
    readable,
    skipped,
    sparse_runs,
)
from common import checkpoint, cli, masking, paths
from common.data import Resident, Streamed, reader
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device

IMAGES = {"type": cli.positive, "default": 10_000}  # training images for activation statistics
SEVERAL = cli.number(int, 3)


def arguments(doc: str, **flags: dict[str, Any]) -> argparse.Namespace:
    """The command line of an analysis that evaluates networks: `root`, its flags, and `read`.

    A flag is what argparse's add_argument takes; `read(description)` opens a data set.
    """
    parser = parse_root(doc)
    for name, how in flags.items():
        how["help"] += " (default: %(default)s)" * ("default" in how)
        parser.add_argument(f"--{name}", **how)
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    args.read = reader(args.data_dir, pick_device(args.device), args.workers)
    return args


def build(entry: dict[str, Any], data: Resident | Streamed) -> nn.Module:
    """The network of a checkpoint, with its weights, where the data are."""
    model = build_model(**entry["model"])
    model.load_state_dict(entry["state_dict"])
    return model.to(data.device, memory_format=torch.channels_last)


def imp_networks(root: Path, rounds: bool) -> list[dict[str, Any]]:
    """The networks that IMP pruned below `root`: file, sparsity, seed and the file pruned from.

    At the asked sparsities, or with `rounds` after each round of the chains that kept them.
    One that cannot be read, or whose dense network is not below `root`, is skipped.
    """
    dense, found = dense_files(root), []
    for run in find_results(root, "prune_imp"):
        source = dense.get(run.get("arguments", {}).get("dense"))
        if source is None:
            skipped(f"{run['folder']}: its dense network is not below {root}")
            continue
        kept = rounds and paths.round_files(run["folder"])
        for sparsity, path in (kept or paths.imp_files(run["folder"])).items():
            if entry := readable(checkpoint.load, path, ("mask", *checkpoint.WEIGHTS)):
                about = {"model": entry["model"]["name"], "width": entry["model"]["width"]}
                about |= {"dataset": entry["dataset"]["name"], "tag": entry.get("tag") or ""}
                about |= {"seed": entry["seed"], "source": source, "file": path}
                reached = masking.sparsity(entry["mask"]) if kept else sparsity
                found.append(about | {"sparsity": reached, "rounds": bool(kept)})
    return found


def alignments(root: Path) -> list[dict[str, Any]]:
    """Every permutation of dense runs below `root`: its files and how it was made.

    `sparsity` is that of the masks it is for, None for all. One whose dense runs are not below
    `root` is skipped. Raises UserError when there is none.
    """
    dense, found = dense_files(root), []
    for run in find_results(root, "align_mask"):
        arguments = run.get("arguments", {})
        if not isinstance(arguments.get("source_seed"), int):
            continue  # of networks trained elsewhere, whose module is not known here
        files = {role: dense.get(arguments.get(role)) for role in ("source", "target")}
        if missing := [role for role, file in files.items() if file is None]:
            skipped(f"{run['folder']}: its dense {missing[0]} is not below {root}")
            continue
        target = checkpoint.load_json(files["target"].with_name("result.json"))["arguments"]
        keys = ("method", "source_seed", "target_seed", "match_epoch")
        about = {key: target[key] for key in NETWORK} | {key: arguments[key] for key in keys}
        about["tag"] = arguments.get("tag") or target.get("tag") or ""
        for path in paths.permutation_files(run["folder"]):
            of_one = {"permutation": path, "sparsity": paths.sparsity_of(path)}
            found.append(about | files | of_one)
    if not found:
        raise UserError(f"no finished alignment below {root}: run align_mask.py first")
    return found


def triples(root: Path) -> pd.DataFrame:
    """Files that belong together: of an lth, a permuted, a dense network, a permutation.

    A row a cell and pair of seeds, late matches first.
    """
    runs = sparse_runs(root)
    plain, key = runs[~runs["signs"] & ~runs["fan_in"]], [*CELL, "source_seed", "tag"]
    lth = plain[plain["arm"] == "lth"].drop_duplicates(key)
    permuted = plain[plain["arm"] == "permuted"].dropna(subset="match_epoch")
    pairs = permuted.astype({"match_epoch": int}).merge(lth[[*key, "path"]], on=key)
    if pairs.empty:
        two = f"no permuted network with LTH's beside it below {root}"
        raise UserError(f"{two}: run train_sparse.py for both")
    aligned = pd.DataFrame(alignments(root)).rename(columns={"source": "dense"})
    found = pairs.merge(
        aligned, on=[*NETWORK, *SEEDS, "method", "match_epoch"], suffixes=("", "_aligned")
    )
    tag, sparsity = found["tag_aligned"], found["sparsity_aligned"]
    fits = (tag == "") | (tag == found["tag"].str.split(" ").str[0])
    found = found[fits & (sparsity.isna() | (sparsity == found["sparsity"]))]
    found = found.assign(lth=found["path_y"].map(paths.final_file))
    found = found.assign(permuted=found["path_x"].map(paths.final_file))
    order = {"ascending": False, "kind": "stable", "ignore_index": True}
    return found.sort_values("match_epoch", **order)
