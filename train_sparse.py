"""Stage 4: train a network under a mask, from the weights it had at a rewind epoch.

    python train_sparse.py --arm lth      --weights runs/dense/seed0 --masks runs/imp/seed0 \
        --sparsity 0.9 --rewind 0 10 25 --out runs/sparse/lth/seed0-seed0
    python train_sparse.py --arm naive    --weights runs/dense/seed1 --masks runs/imp/seed0                    ...
    python train_sparse.py --arm permuted --weights runs/dense/seed1 --masks runs/align/activation/seed0-seed1 ...

Trains one network for every (sparsity, rewind epoch k), for T - k epochs on a fresh schedule, the mask applied
after every step. Writes s0.90_k010/final.pt, log.csv and, last of all, result.json. Called again it does what
is missing; a run that was cut off goes on from its last epoch.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from common import checkpoint, cli, masking
from common.data import load_described
from common.errors import UserError
from common.models import build_model
from common.training import cpu_state, learning_rates, pick_device, pick_precision, train

ARMS = ("lth", "naive", "permuted")


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--arm", choices=ARMS, required=True, help="what the run is to show; must agree with weights and masks"
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help="dense run whose weights at the rewind epoch are trained"
    )
    parser.add_argument("--masks", type=Path, required=True, help="masks folder, from prune_imp.py or align_mask.py")
    parser.add_argument(
        "--sparsity",
        type=cli.share,
        nargs="+",
        required=True,
        metavar="S",
        help="sparsities, each with a mask in --masks",
    )
    parser.add_argument(
        "--rewind",
        type=cli.natural,
        nargs="+",
        required=True,
        metavar="K",
        help="rewind epochs, each kept by the dense run",
    )
    parser.add_argument(
        "--epochs", type=cli.positive, metavar="T", help="train T - K epochs (default: T of the dense run)"
    )
    parser.add_argument(
        "--seed", type=cli.natural, help="of data order and augmentation (default: the seed of the weights)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; each goes to its own s<S>_k<K>/")
    cli.add_training(parser, "sparse")
    cli.add_device(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dense = checkpoint.load_dense(args.weights)
    cli.paper_defaults(args, "sparse", dense["dataset"]["name"])
    total = args.epochs or dense["result"]["arguments"]["epochs"]
    seed = dense["seed"] if args.seed is None else args.seed
    model = build_model(**dense["model"], seed=dense["seed"])

    # Read and check every input before the first run starts.
    masks = {s: load_mask(args.masks, s, args.arm, dense, model) for s in sorted(set(args.sparsity))}
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
            } | cli.hyper(args, "lr", "schedule", "warmup", "weight_decay", "batch_size", "momentum", "precision")  # fmt: skip
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
    for folder, arguments, weights, mask in todo:
        rewind = arguments["rewind"]
        model.load_state_dict(masking.apply(weights["state_dict"], mask["mask"]))
        checkpoint.claim(folder, arguments)
        rows = train(
            model, data, learning_rates(args.schedule, args.lr, total - rewind, args.warmup), folder=folder,
            name=f"{args.arm} {mask['source_seed']}-{dense['seed']} s{checkpoint.label(arguments['sparsity'])} k{rewind:03d}", seed=seed,
            batch_size=args.batch_size, momentum=args.momentum, weight_decay=args.weight_decay, precision=precision,
            first_epoch=rewind, mask=mask["mask"],
        )  # fmt: skip
        about = {key: dense[key] for key in ("model", "dataset", "seed")}
        checkpoint.save(
            about | {"epoch": total, "state_dict": cpu_state(model), "mask": mask["mask"]}, folder / "final.pt"
        )
        checkpoint.finish(
            folder, "train_sparse", arguments, rows, device, precision, sparsity_total=mask["sparsity_total"]
        )


def load_mask(folder: Path, sparsity: float, arm: str, dense: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """Read the mask of a sparsity; raises UserError when it does not fit the network or contradicts the arm."""
    path = checkpoint.mask_file(folder, sparsity)
    mask = checkpoint.load(path, checkpoint.MASKS)
    weights = model.state_dict()
    shapes = {name: tuple(entry.shape) for name, entry in mask["mask"].items()}
    if mask["model"] != dense["model"] or any(
        name not in weights or tuple(weights[name].shape) != shape for name, shape in shapes.items()
    ):
        raise UserError(f"{path} is a mask for {mask['model']}, and the weights are {dense['model']}")
    if abs(masking.sparsity(mask["mask"]) - sparsity) > 1 / masking.size(mask["mask"]):
        raise UserError(
            f"{path} prunes {masking.sparsity(mask['mask']):.4%}, not {sparsity:.2%}: it was changed after stage 2"
        )
    source, target, seed = mask["source_seed"], mask["target_seed"], dense["seed"]
    fits = {
        "lth": target is None and source == seed,
        "naive": target is None and source != seed,
        "permuted": target == seed,
    }
    if not fits[arm]:
        made = f"seed {source}, unpermuted" if target is None else f"seed {source}, permuted onto seed {target}"
        raise UserError(f"--arm {arm} contradicts the files: {path} is of {made}, and the weights are of seed {seed}")
    return mask | {"sha256": checkpoint.digest(path)}


if __name__ == "__main__":
    cli.run(main)
