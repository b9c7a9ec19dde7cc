"""Stage 3: find the permutation that maps the source network onto the target, and permute the masks by it.

    python align_mask.py --source runs/dense/seed0 --target runs/dense/seed1 --masks runs/imp/seed0 \
        --method activation --out runs/align/activation/seed0-seed1

Activation matching: for every axis of channels, the assignment with the largest summed correlation of the two
networks' activations on training images, in one pass over them. The permuted source must compute the same
function, or the script raises. Prints a row an axis, and writes permutation.pt and the permuted masks
(mask_0.90.pt, ...) with their signs. Called again, it permutes the masks that have come since.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from common import checkpoint, cli
from common.data import load_described
from common.errors import UserError
from common.matching import match_activations
from common.models import build_model
from common.permutation import check_same_function, find_axes, permute
from common.training import pick_device


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="dense run whose masks are permuted")
    parser.add_argument("--target", type=Path, required=True, help="dense run onto which the source is permuted")
    parser.add_argument("--masks", type=Path, required=True, help="masks folder of the source, from prune_imp.py")
    parser.add_argument("--method", choices=("activation",), default="activation", help="default: %(default)s")
    parser.add_argument(
        "--target-epoch",
        type=cli.natural,
        metavar="K",
        help="match against the target after K epochs (default: its last)",
    )
    parser.add_argument(
        "--match-images",
        type=cli.positive,
        metavar="N",
        help="training images to match on (default: all; imagenet: 12800)",
    )
    parser.add_argument(
        "--batch-size", type=cli.positive, default=500, help="images a forward pass (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the permutation and the permuted masks")
    cli.add_device(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    source = checkpoint.load_dense(args.source)
    target = checkpoint.load_dense(args.target, args.target_epoch)
    if source["model"] != target["model"]:
        raise UserError(f"source and target are different networks: {source['model']} and {target['model']}")
    masks = {path.name: checkpoint.load(path, checkpoint.MASKS) for path in sorted(args.masks.glob("mask_*.pt"))}
    if not masks:
        raise UserError(f"no mask_*.pt in {args.masks}: run prune_imp.py first")
    for name, entry in masks.items():
        if entry["model"] != source["model"]:
            raise UserError(f"{args.masks / name} is for {entry['model']}, and the source is {source['model']}")
        if (entry["source_seed"], entry["target_seed"]) != (source["seed"], None):
            raise UserError(
                f"{args.masks / name} is no mask of the source: made from seed {entry['source_seed']}, target {entry['target_seed']}"
            )

    arguments = cli.hyper(args, "method", "match_images") | {"source": source["sha256"], "target": target["sha256"]}
    arguments |= {"source_seed": source["seed"], "target_seed": target["seed"], "match_epoch": target["epoch"]}
    finished = checkpoint.is_finished(args.out, arguments)
    if finished and all((args.out / name).is_file() for name in masks):
        print(f"{args.out} is finished: nothing to do")
        return

    start = time.perf_counter()
    device = pick_device(args.device)
    data = load_described(target["dataset"], args.data_dir, device, args.workers)
    networks = {}
    for role, entry in (("source", source), ("target", target)):
        networks[role] = build_model(**entry["model"], seed=entry["seed"])
        networks[role].load_state_dict(entry["state_dict"])
        networks[role].to(device)
    axes = find_axes(networks["source"], data.input_shape)

    images = args.match_images or cli.paper_value(cli.MATCH_IMAGES, target["dataset"]["name"])
    batches = [] if finished else data.eval_batches("train", args.batch_size, images)
    if finished:
        permutation = checkpoint.load(args.out / "permutation.pt", ("permutation",))["permutation"]
    else:
        batches = tqdm(
            (x for x, _ in data.eval_batches("train", args.batch_size, images)),
            "matching",
            unit="batch",
            disable=None,
            leave=False,
        )
        permutation, rows = match_activations(networks["source"], networks["target"], axes, batches)
    sample = next(iter(data.eval_batches("test", 16)))[0]
    permuted = permute(source["state_dict"], axes.dims, permutation)
    difference = check_same_function(networks["source"], source["state_dict"], permuted, sample)

    checkpoint.claim(args.out, arguments)
    about = {
        "source_seed": source["seed"],
        "target_seed": target["seed"],
        "method": args.method,
        "match_epoch": target["epoch"],
    }
    for name, entry in masks.items():
        moved = {part: permute(entry[part], axes.dims, permutation) for part in ("mask", "signs")}
        checkpoint.save(entry | {"dataset": target["dataset"]} | about | moved, args.out / name)
    if finished:
        print(f"{args.out}: permuted {len(masks)} masks by the permutation that is there")
        return
    checkpoint.save({"permutation": permutation} | about, args.out / "permutation.pt")
    checkpoint.save_csv(rows, args.out / "log.csv")
    table = pd.DataFrame(rows).rename(columns={"before": "correlation before", "after": "correlation after"})
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(f"the permuted source computes the same function: outputs differ by {difference:.0e} of the largest")
    result = {
        "stage": "align_mask",
        "arguments": arguments,
        "axes": rows,
        "difference": difference,
        "seconds": time.perf_counter() - start,
    }
    checkpoint.save_json(result | checkpoint.environment(device), args.out / "result.json")


if __name__ == "__main__":
    cli.run(main)
