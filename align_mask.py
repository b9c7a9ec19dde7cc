r"""Stage 3: find the permutation that maps the source network onto the target, and permute the masks by it.

    python align_mask.py --source runs/dense/seed0 --target runs/dense/seed1 --masks runs/imp/seed0 \
        --method activation --out runs/align/activation/seed0-seed1

Methods: `activation` (the paper's: correlation of activations on training images, in one pass), `weight`
(inner product of the weights, no data), `masked` (weight matching of the pruned source, one permutation a
sparsity, started from activation matching), and the controls `random` and `identity`. The permuted source must
compute the same function, or the script raises. Prints a row an axis, and writes permutation.pt (for `masked`
permutation_0.90.pt, ...) and the permuted masks (mask_0.90.pt, ...) with their signs. Called again, it permutes
the masks that have come since.

Networks of your own need a function that builds the module, and two state dicts:

    python align_mask.py --source my_a.pt --target my_b.pt --masks my_a_pruned.pt --model-fn package.module:function \
        --dataset cifar10 --out aligned
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from common import checkpoint, cli, foreign, masking
from common.axes import find_axes
from common.data import DATASETS, Resident, Streamed, load_data, load_described
from common.errors import UserError
from common.matching import match_activations, match_weights, match_weights_best, matched_weights, objective
from common.models import build_model
from common.permutation import check_same_function, identity, permute, random_permutation
from common.training import pick_device

METHODS = ("activation", "weight", "masked", "random", "identity")
HOW = ("post", "correlation", "last")  # the paper's activation matching


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="dense run whose masks are permuted")
    parser.add_argument("--target", type=Path, required=True, help="dense run onto which the source is permuted")
    parser.add_argument("--masks", type=Path, help="masks folder of the source, from prune_imp.py")
    parser.add_argument("--method", choices=METHODS, default="activation", help="default: %(default)s")
    parser.add_argument("--target-epoch", type=cli.natural, metavar="K", help="of the target (default: its last)")
    parser.add_argument("--restarts", type=cli.positive, default=5, help="of weight matching (default: %(default)s)")
    parser.add_argument("--seed", type=cli.natural, default=0, help="of random choices (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the permutation and the permuted masks")
    group = parser.add_argument_group("activation matching (defaults are the paper's)")
    group.add_argument("--match-images", type=cli.positive, metavar="N", help="default: all; imagenet: 12800")
    group.add_argument("--batch-size", type=cli.positive, help="images a pass (default: 250; imagenet: 32)")
    for flag, choices, text in (
        ("--match-on", ("post", "pre"), "values after or before the nonlinearity"),
        ("--statistic", ("correlation", "covariance"), "of two channels over images and places"),
        ("--stream", ("last", "mean"), "of a residual stream its last block, or the mean over all"),
    ):
        group.add_argument(flag, choices=choices, default=choices[0], help=f"{text} (default: {choices[0]})")
    group = parser.add_argument_group("networks of one's own: --source and --target are state dicts")
    group.add_argument("--model-fn", metavar="M:F", help="function F() of module M that builds the network")
    group.add_argument("--dataset", choices=DATASETS, help="to match activations on, normalised by its own statistics")
    group.add_argument(
        "--image-size", type=cli.number(int, 8), metavar="PX", help="of that data set, in px (default: its own)"
    )
    group.add_argument("--input-shape", type=cli.positive, nargs="+", help="without --dataset (default: 3 32 32)")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    if args.method not in ("activation", "masked") and (args.match_on, args.statistic, args.stream) != HOW:
        parser.error(f"--match-on, --statistic and --stream say how to match activations, not --method {args.method}")
    if args.model_fn is None and (args.dataset or args.image_size or args.input_shape):
        parser.error("--dataset, --image-size and --input-shape go with --model-fn: a dense run knows its own")
    if args.model_fn is None and args.masks is None:
        parser.error("--masks is needed: the masks folder of the source, from prune_imp.py")
    if args.model_fn and args.method in ("activation", "masked") and args.dataset is None:
        parser.error(f"--method {args.method} looks at images: name them with --dataset")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    load = load_own if args.model_fn else load_runs
    (source, target), masks, networks, data = load(args, device)
    how = {name: getattr(args, name) for name in ("match_on", "statistic", "stream")}
    method = "-".join([args.method, *(value for value, usual in zip(how.values(), HOW) if value != usual)])
    arguments = cli.hyper(args, "match_images", "restarts", "seed") | {
        "method": method, "source": source["sha256"], "target": target["sha256"],
        "source_seed": source["seed"], "target_seed": target["seed"], "match_epoch": target["epoch"],
    }  # fmt: skip
    if args.model_fn:
        arguments |= cli.hyper(args, "model_fn", "dataset", "image_size", "input_shape")
    finished = checkpoint.is_finished(args.out, arguments)
    missing = {name: entry for name, entry in masks.items() if not is_there(args.out / name, entry["unpermuted"])}
    if finished and not missing:
        print(f"{args.out} is finished: nothing to do")
        return

    start = time.perf_counter()
    for network, entry in zip(networks, (source, target)):
        network.load_state_dict(entry["state_dict"])
        network.to(device)
    axes = find_axes(networks[0], source["model"]["input_shape"])
    if not axes.sizes:
        reasons = "; ".join(f"{axis}: {reason}" for axis, (_, reason) in axes.pinned.items())
        raise UserError(f"nothing in this network may be permuted ({reasons})")
    weights = matched_weights(networks[0])
    ends = [{name: entry["state_dict"][name].to(device) for name in weights} for entry in (source, target)]

    @functools.cache
    def by_activations() -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        images = data()
        imagenet = isinstance(images, Streamed)
        count = args.match_images or cli.MATCH_IMAGES[imagenet]
        batches = (x for x, _ in images.eval_batches("train", args.batch_size or cli.MATCH_BATCH[imagenet], count))
        bar = tqdm(batches, "matching", unit="batch", disable=None, leave=False)
        return match_activations(*networks, axes, bar, **how)

    def find(entry: dict[str, Any]) -> dict[str, Any]:
        """The permutation for a mask, with the objective <π(source), target> before and after, and a row an axis."""
        rows, matched = None, ends[0]
        if args.method == "activation":
            permutation, rows = by_activations()
        elif args.method == "weight":
            permutation = match_weights_best(*ends, axes, args.restarts, args.seed)
        elif args.method == "masked":
            matched = masking.apply(ends[0], entry["mask"])
            permutation = match_weights(matched, ends[1], axes, by_activations()[0], args.seed)[0]
        elif args.method == "random":
            permutation = random_permutation(axes, args.seed)
        else:
            permutation = identity(axes)
        gain = [objective(matched, ends[1]), objective(permute(matched, axes.dims, permutation), ends[1])]
        rows = rows or [
            {"axis": axis, "channels": len(index), "moved": moved(index)} for axis, index in permutation.items()
        ]
        return about | {"permutation": permutation, "objective": gain, "rows": rows}

    about = {key: arguments[key] for key in ("source_seed", "target_seed", "method", "match_epoch")}
    sample = torch.randn(4, *source["model"]["input_shape"], generator=torch.Generator().manual_seed(0))
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
    before = checkpoint.load_json(args.out / "result.json")["seconds"] if finished else 0  # of masks that came earlier
    result = {
        "stage": "align_mask",
        "arguments": arguments,
        "objective": objectives,
        "seconds": before + time.perf_counter() - start,
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


Loaded = tuple[
    tuple[dict[str, Any], dict[str, Any]],
    dict[str, dict[str, Any]],
    list[torch.nn.Module],
    Callable[[], Resident | Streamed],
]  # source and target, masks by file name, the two modules, and what reads the images


def load_runs(args: argparse.Namespace, device: torch.device) -> Loaded:
    """Dense runs of stage 1 and masks of stage 2; raises UserError when they do not fit together."""
    source, target = checkpoint.load_dense(args.source), checkpoint.load_dense(args.target, args.target_epoch)
    if source["model"] != target["model"]:
        raise UserError(f"source and target are different networks: {source['model']} and {target['model']}")
    if (source["seed"], source["dataset"]["name"]) == (target["seed"], target["dataset"]["name"]):
        raise UserError(f"source and target are the same network, of seed {source['seed']}")
    masks = masking.load_all(args.masks, source)
    networks = [build_model(**entry["model"], seed=entry["seed"]) for entry in (source, target)]
    return (
        (source, target),
        masks,
        networks,
        lambda: load_described(target["dataset"], args.data_dir, device, args.workers),
    )


def load_own(args: argparse.Namespace, device: torch.device) -> Loaded:
    """State dicts of one's own, and masks in our form or torch's."""
    networks = [foreign.build(args.model_fn), foreign.build(args.model_fn)]
    images = None
    if args.dataset:
        images = load_data(args.dataset, args.data_dir, args.image_size, None, device, workers=args.workers)
    shape = list(images.input_shape) if images else args.input_shape or [3, 32, 32]
    source, target = (
        foreign.load_weights(path, args.model_fn, network, shape)
        for path, network in zip((args.source, args.target), networks)
    )
    masks = foreign.load_masks(args.masks or args.source, source, networks[0])
    return (source, target), masks, networks, lambda: images


if __name__ == "__main__":
    cli.run(main)
