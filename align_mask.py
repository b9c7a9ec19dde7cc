r"""Stage 3: find the permutation that maps the source network onto the target, and permute the masks by it.

    python align_mask.py --source runs/dense/seed0 --target runs/dense/seed1 --masks runs/imp/seed0 \
        --method activation --out runs/align/activation/seed0-seed1

Methods: `activation` (the paper's: correlation of activations on training images, in one pass), `weight`
(inner product of the weights, no data), `masked` (weight matching of the pruned source, one permutation a
sparsity, started from activation matching), and the controls `random` and `identity`. The permuted source must
compute the same function, or the script raises. Prints a row an axis, and writes permutation.pt (for `masked`
permutation_0.90.pt, ...) and the permuted masks (mask_0.90.pt, ...) with their signs. Called again, it permutes
the masks that have come since.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from common import checkpoint, cli, masking
from common.axes import find_axes
from common.data import load_described
from common.errors import UserError
from common.matching import match_activations, match_weights, matched_weights, objective
from common.models import build_model
from common.permutation import check_same_function, permute, random_permutation
from common.training import pick_device

METHODS = ("activation", "weight", "masked", "random", "identity")


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="dense run whose masks are permuted")
    parser.add_argument("--target", type=Path, required=True, help="dense run onto which the source is permuted")
    parser.add_argument("--masks", type=Path, required=True, help="masks folder of the source, from prune_imp.py")
    parser.add_argument("--method", choices=METHODS, default="activation", help="default: %(default)s")
    parser.add_argument("--target-epoch", type=cli.natural, metavar="K", help="of the target (default: its last)")
    parser.add_argument("--match-images", type=cli.positive, metavar="N", help="default: all; imagenet: 12800")
    parser.add_argument("--batch-size", type=cli.positive, default=250, help="images a pass (default: %(default)s)")
    parser.add_argument("--restarts", type=cli.positive, default=5, help="of weight matching (default: %(default)s)")
    parser.add_argument("--seed", type=cli.natural, default=0, help="of random choices (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the permutation and the permuted masks")
    cli.add_device(parser)
    cli.add_data(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    source = checkpoint.load_dense(args.source)
    target = checkpoint.load_dense(args.target, args.target_epoch)
    masks = load_masks(args.masks, source, target)
    arguments = cli.hyper(args, "method", "match_images", "restarts", "seed") | {
        "source": source["sha256"], "target": target["sha256"],
        "source_seed": source["seed"], "target_seed": target["seed"], "match_epoch": target["epoch"],
    }  # fmt: skip
    finished = checkpoint.is_finished(args.out, arguments)
    missing = {name: entry for name, entry in masks.items() if not is_there(args.out / name, entry["unpermuted"])}
    if finished and not missing:
        print(f"{args.out} is finished: nothing to do")
        return

    start = time.perf_counter()
    device = pick_device(args.device)
    networks = [build_model(**entry["model"], seed=entry["seed"]) for entry in (source, target)]
    for network, entry in zip(networks, (source, target)):
        network.load_state_dict(entry["state_dict"])
        network.to(device)
    axes = find_axes(networks[0], source["model"]["input_shape"])
    weights = matched_weights(networks[0])
    ends = [{name: entry["state_dict"][name].to(device) for name in weights} for entry in (source, target)]

    def by_activations() -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        data = load_described(target["dataset"], args.data_dir, device, args.workers)
        count = args.match_images or cli.paper_value(cli.MATCH_IMAGES, target["dataset"]["name"])
        batches = (images for images, _ in data.eval_batches("train", args.batch_size, count))
        return match_activations(*networks, axes, tqdm(batches, "matching", unit="batch", disable=None, leave=False))

    def find(entry: dict[str, Any]) -> dict[str, Any]:
        """The permutation for a mask, with the objective <π(source), target> before and after, and a row an axis."""
        rows, matched = None, ends[0]
        if args.method == "activation":
            permutation, rows = by_activations()
        elif args.method == "weight":
            identity = {axis: torch.arange(size) for axis, size in axes.sizes.items()}
            starts = [identity, *(random_permutation(axes, args.seed + i) for i in range(1, args.restarts))]
            tries = [match_weights(*ends, axes, begin, args.seed + i) for i, begin in enumerate(starts)]
            permutation = max(tries, key=lambda found: found[1][-1])[0]
        elif args.method == "masked":
            matched = masking.apply(ends[0], entry["mask"])
            permutation = match_weights(matched, ends[1], axes, by_activations()[0], args.seed)[0]
        elif args.method == "random":
            permutation = random_permutation(axes, args.seed)
        else:
            permutation = {axis: torch.arange(size) for axis, size in axes.sizes.items()}
        gain = [objective(matched, ends[1]), objective(permute(matched, axes.dims, permutation), ends[1])]
        rows = rows or [
            {"axis": axis, "channels": len(index), "moved": moved(index)} for axis, index in permutation.items()
        ]
        return about | {"permutation": permutation, "objective": gain, "rows": rows}

    about = {key: arguments[key] for key in ("source_seed", "target_seed", "method", "match_epoch")}
    sample = torch.randn(16, *source["model"]["input_shape"], generator=torch.Generator().manual_seed(0))
    for name, entry in missing.items():
        path = args.out / (name.replace("mask", "permutation") if args.method == "masked" else "permutation.pt")
        found = checkpoint.load(path, ("permutation", "objective", "rows")) if path.is_file() else find(entry)
        permuted = permute(source["state_dict"], axes.dims, found["permutation"])
        difference = check_same_function(networks[0], source["state_dict"], permuted, sample)
        checkpoint.claim(args.out, arguments)
        if not path.is_file():
            checkpoint.save(found, path)
            print(pd.DataFrame(found["rows"]).to_string(index=False, float_format="{:.3f}".format))
            print(
                f"objective <π(source), target>: {found['objective'][0]:.4g} before, {found['objective'][1]:.4g} after"
            )
            print(f"the permuted source computes the same function: outputs differ by {difference:.0e} of the largest")
        parts = {part: permute(entry[part], axes.dims, found["permutation"]) for part in ("mask", "signs")}
        checkpoint.save(entry | {"dataset": target["dataset"]} | about | parts, args.out / name)
        print(f"wrote {args.out / name}")

    permutations = {path.stem: checkpoint.load(path) for path in sorted(args.out.glob("permutation*.pt"))}
    rows = [{"permutation": name} | row for name, found in permutations.items() for row in found["rows"]]
    checkpoint.save_csv(rows, args.out / "log.csv")
    objectives = {name: found["objective"] for name, found in permutations.items()}
    result = {
        "stage": "align_mask",
        "arguments": arguments,
        "objective": objectives,
        "seconds": time.perf_counter() - start,
    }
    checkpoint.save_json(result | checkpoint.environment(device), args.out / "result.json")


def is_there(path: Path, unpermuted: str) -> bool:
    """Whether the permuted mask of the file with digest `unpermuted` is at `path`; another one there is a UserError."""
    if not path.is_file():
        return False
    if checkpoint.load(path).get("unpermuted") != unpermuted:
        raise UserError(f"{path} is a permutation of another mask: choose another --out or remove it")
    return True


def moved(index: torch.Tensor) -> int:
    return int((index != torch.arange(len(index))).sum())


def load_masks(folder: Path, source: dict[str, Any], target: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read all masks of the source; raises UserError when they, the source and the target do not fit together."""
    if source["model"] != target["model"]:
        raise UserError(f"source and target are different networks: {source['model']} and {target['model']}")
    if (source["seed"], source["dataset"]["name"]) == (target["seed"], target["dataset"]["name"]):
        raise UserError(f"source and target are the same network, of seed {source['seed']}")
    masks = {}
    for path in sorted(folder.glob("mask_*.pt")):
        entry = masks[path.name] = checkpoint.load(path, checkpoint.MASKS) | {"unpermuted": checkpoint.digest(path)}
        if entry["model"] != source["model"]:
            raise UserError(f"{path} is for {entry['model']}, and the source is {source['model']}")
        for part in ("mask", "signs"):
            masking.check_fits(entry[part], source["state_dict"], path)
        if (entry["source_seed"], entry["target_seed"]) != (source["seed"], None):
            made = f"made from seed {entry['source_seed']}, target {entry['target_seed']}"
            raise UserError(f"{path} is no mask of the source: {made}")
        if any(not torch.equal(sign, source["state_dict"][name] > 0) for name, sign in entry["signs"].items()):
            raise UserError(f"{path} was pruned from another network than the source, though of the same seed")
    if not masks:
        raise UserError(f"no mask_*.pt in {folder}: run prune_imp.py first")
    return masks


if __name__ == "__main__":
    cli.run(main)
