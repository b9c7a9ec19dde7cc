"""Stage 4: train a network under a mask, from the weights it had at a rewind epoch.

    python train_sparse.py --arm lth      --weights runs/dense/seed0 --masks runs/imp/seed0 \
        --sparsity 0.9 --rewind 0 10 25 --out runs/sparse/lth/seed0-seed0
    python train_sparse.py --arm naive    --weights runs/dense/seed1 --masks runs/imp/seed0                    ...
    python train_sparse.py --arm permuted --weights runs/dense/seed1 --masks runs/align/activation/seed0-seed1 ...

Controls: `shuffled` (naive, the mask shuffled within each layer), `random-permutation` (masks from align_mask.py
--method random) and `imp-target` (the target under its own IMP mask); --signs gives the kept weights the signs
of the source at its last epoch, in any arm.

Trains one network for every (sparsity, rewind epoch k), for T - k epochs on a fresh schedule, the mask applied
after every step. Writes s0.90_k010/final.pt, log.csv and, last of all, result.json. A run that diverges ends as a
result, with the accuracy that it had then, and without final.pt. Called again it does what is missing; a run that was
cut off goes on from its last epoch.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from common import checkpoint, cli, masking
from common.data import load_described
from common.errors import UserError
from common.models import build_model
from common.parallel import run_all
from common.training import Diverged, cpu_state, learning_rates, pick_device, pick_precision, train

ARMS = ("lth", "naive", "permuted", "shuffled", "random-permutation", "imp-target")


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--arm", choices=ARMS, required=True, help="what the run shows; must agree with the files")
    parser.add_argument("--weights", type=Path, required=True, help="dense run whose weights are trained")
    parser.add_argument("--masks", type=Path, required=True, help="folder from prune_imp.py or align_mask.py")
    parser.add_argument("--sparsity", type=cli.share, nargs="+", required=True, metavar="S", help="each has a mask")
    parser.add_argument("--rewind", type=cli.natural, nargs="+", required=True, metavar="K", help="epochs of --weights")
    parser.add_argument(
        "--epochs", type=cli.positive, metavar="T", help="train T - K epochs (default: the dense run's)"
    )
    parser.add_argument("--seed", type=cli.natural, help="of order and augmentation (default: of the weights)")
    parser.add_argument("--signs", action="store_true", help="give kept weights the signs in the masks folder")
    parser.add_argument("--fan-in", action="store_true", help="scale kept weights by sqrt(fan-in / kept fan-in) a unit")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; each goes to its own s<S>_k<K>/")
    cli.add_training(parser, "sparse")
    cli.add_device(parser)
    cli.add_data(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dense = checkpoint.load_dense(args.weights)
    cli.paper_defaults(args, "sparse", dense["dataset"]["name"])
    total = args.epochs or dense["result"]["arguments"]["epochs"]
    seed = dense["seed"] if args.seed is None else args.seed

    # Read and check every input before the first run starts.
    masks = {s: load_mask(args.masks, s, args.arm, dense) for s in sorted(set(args.sparsity))}
    rewound = {k: checkpoint.load_dense(args.weights, k) for k in sorted(set(args.rewind))}
    if max(rewound) >= total:
        raise UserError(f"--rewind {max(rewound)} leaves no epoch to train: T is {total}")
    todo = []
    for sparsity, mask in masks.items():
        for rewind, weights in rewound.items():
            folder = args.out / f"s{checkpoint.label(sparsity)}_k{rewind:03d}"
            arguments = {
                "arm": args.arm, "model": dense["model"]["name"], "width": dense["model"]["width"], "dataset": dense["dataset"]["name"],
                "sparsity": sparsity, "rewind": rewind, "epochs": total, "source_seed": mask["source_seed"], "target_seed": dense["seed"],
                "seed": seed, "method": mask["method"], "match_epoch": mask["match_epoch"], "weights": weights["sha256"], "mask": mask["sha256"],
                "mask_dataset": mask["mask_dataset"],
            } | cli.hyper(args, "signs", "fan_in", "lr", "schedule", "warmup", "weight_decay", "batch_size", "momentum", "precision")  # fmt: skip
            if checkpoint.is_finished(folder, arguments):
                print(f"{folder} is finished: nothing to do")
            else:
                todo.append((folder, arguments, weights, mask))
    if not todo:
        return

    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    data = load_described(dense["dataset"], args.data_dir, device, args.workers)
    data.steps(args.batch_size)

    def run(folder: Path, arguments: dict[str, Any], weights: dict[str, Any], mask: dict[str, Any]) -> None:
        rewind, network = arguments["rewind"], build_model(**dense["model"], seed=dense["seed"])
        network.load_state_dict(start_weights(weights["state_dict"], mask, args.signs, args.fan_in))
        checkpoint.claim(folder, arguments)
        diverged = None
        try:
            rows = train(
                network, data, learning_rates(args.schedule, args.lr, total - rewind, args.warmup), folder=folder,
                name=f"{args.arm} {mask['source_seed']}-{dense['seed']} s{checkpoint.label(arguments['sparsity'])} k{rewind:03d}", seed=seed,
                batch_size=args.batch_size, momentum=args.momentum, weight_decay=args.weight_decay, precision=precision,
                first_epoch=rewind, mask=mask["mask"], compiled=args.compile, progress=args.parallel is None,
            )  # fmt: skip
            about = {key: dense[key] for key in ("model", "dataset", "seed")}
            checkpoint.save(
                about | {"epoch": total, "state_dict": cpu_state(network), "mask": mask["mask"]}, folder / "final.pt"
            )
        except Diverged as error:  # a result too: naive VGG11 is unstable at 95% (paper, section 5)
            print(f"{error}; this is recorded as the run's result")
            rows, diverged = error.rows, error.rows[-1]["epoch"]
        checkpoint.finish(
            folder, "train_sparse", arguments, rows, device, precision, diverged=diverged, sparsity_total=mask["sparsity_total"]
        )  # fmt: skip

    runs = {str(folder): partial(run, folder, *more) for folder, *more in todo}
    run_all(runs, args.parallel, dense["model"]["width"], data)


def start_weights(weights: dict[str, Tensor], mask: dict[str, Any], signs: bool, fan_in: bool) -> dict[str, Tensor]:
    """The weights at the rewind epoch under the mask, with transferred signs and fan-in rescaling as asked."""
    start = masking.apply(weights, mask["mask"])
    if signs:
        start |= masking.with_signs({name: start[name] for name in mask["mask"]}, mask["signs"])
    if fan_in:
        start |= masking.rescale_fan_in({name: start[name] for name in mask["mask"]}, mask["mask"])
    return start


def load_mask(folder: Path, sparsity: float, arm: str, dense: dict[str, Any]) -> dict[str, Any]:
    """Read the mask of a sparsity; raises UserError when it does not fit the network or contradicts the arm."""
    path = checkpoint.mask_file(folder, sparsity)
    mask = masking.load(path, dense)
    if abs(masking.sparsity(mask["mask"]) - sparsity) > 1 / masking.size(mask["mask"]):
        raise UserError(
            f"{path} prunes {masking.sparsity(mask['mask']):.4%}, not {sparsity:.2%}: it was changed after stage 2"
        )
    source, target, seed = mask["source_seed"], mask["target_seed"], dense["seed"]
    here = dense["dataset"]["name"]
    mask.setdefault("mask_dataset", mask["dataset"]["name"])
    itself = (source, mask["mask_dataset"]) == (seed, here)
    own, foreign = target is None and itself, target is None and not itself
    onto = (target, mask["dataset"]["name"]) == (seed, here)
    random = mask["method"] == "random"
    fits = {"lth": own, "imp-target": own, "naive": foreign, "shuffled": foreign}
    fits |= {"permuted": onto and not random, "random-permutation": onto and random}
    if not fits[arm]:
        made = f"seed {source}, " + (
            "unpermuted" if target is None else f"permuted onto seed {target} by {mask['method']}"
        )
        raise UserError(f"--arm {arm} contradicts the files: {path} is of {made}, and the weights are of seed {seed}")
    if own:
        masking.check_source(mask, dense, path)
    if arm == "shuffled":
        mask["mask"] = masking.shuffle(mask["mask"], seed)
    return mask


if __name__ == "__main__":
    cli.run(main, spreads=True)
