"""Stage 4: train a network under a mask, from the weights of a rewind epoch.

    python train_sparse.py --arm lth --weights runs/dense/seed0 --masks runs/imp/seed0 \\
        --sparsity 0.9 --rewind 0 10 25 --out runs/sparse/lth/seed0-seed0

`--arm naive` trains runs/dense/seed1 under the same masks, `--arm permuted` under those of
runs/align/activation/seed0-seed1. Control arms: `shuffled` (naive, with the mask shuffled within
each layer), `random-permutation` (masks from align_mask.py --method random) and `imp-target` (the
target under its own IMP mask). In any arm, --signs gives the kept weights the signs that the source
has at its last epoch.

Trains one network for every sparsity and rewind epoch k, for T - k epochs on a new schedule, and
applies the mask after every step. Writes s0.90_k010/final.pt, log.csv and finally result.json. A
run that diverges is recorded with its last accuracy, without final.pt. Run again, it trains what is
missing and resumes what was interrupted.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint, cli, masking, paths, runs
from common.arms import ARMS, load_mask
from common.data import load_data, stage_seed
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device
from common.runtime.parallel import run_all
from common.training import Diverged, cpu_state, learning_rates, train


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, several = parser.add_argument, {"nargs": "+", "required": True}
    add("--arm", choices=ARMS, required=True, help="must agree with --weights and --masks")
    add("--weights", type=Path, required=True, help="dense run whose weights are trained")
    add("--masks", type=Path, required=True, help="folder from prune_imp.py or align_mask.py")
    add("--sparsity", type=cli.fraction, metavar="S", help="sparsities of the masks", **several)
    add("--rewind", type=cli.natural, metavar="K", help="epochs of --weights", **several)
    add("--epochs", type=cli.positive, metavar="T", help="train T - K (default: the dense run's)")
    add("--seed", type=cli.natural, help="of order and augmentation (default: of the weights)")
    add("--signs", action="store_true", help="give kept weights the signs in the masks folder")
    add("--fan-in", action="store_true", help="scale kept weights by sqrt(fan-in / kept fan-in)")
    add("--out", type=Path, required=True, help="output folder; each run goes to its s<S>_k<K>/")
    cli.add_training(parser, "sparse")
    cli.add_device(parser)
    cli.add_data(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dense = checkpoint.load_dense(args.weights)
    model_config, dataset = dense["model"], dense["dataset"]
    dense_arguments, width = dense["result"]["arguments"], model_config["width"]
    shared = cli.experiment_arguments(args, "weights", "masks")
    shared |= cli.hyperparameters(args, "sparse", dataset["name"])
    shared |= {"epochs": args.epochs or dense_arguments["epochs"], "target_seed": dense["seed"]}
    shared |= {"model": model_config["name"], "width": width, "dataset": dataset["name"]}
    shared["seed"] = dense["seed"] if args.seed is None else args.seed

    # Read and check every input before the first run starts.
    masks = {s: load_mask(args.masks, s, args.arm, dense) for s in sorted(set(args.sparsity))}
    rewound = {k: checkpoint.load_dense(args.weights, k) for k in sorted(set(args.rewind))}
    if max(rewound) >= shared["epochs"]:
        raise UserError(f"--rewind {max(rewound)} leaves no epoch to train: T = {shared['epochs']}")
    pending = []
    for (sparsity, mask_info), (rewind, start) in itertools.product(masks.items(), rewound.items()):
        folder = paths.sparse_folder(args.out, sparsity, rewind)
        arguments = shared | {"sparsity": sparsity, "rewind": rewind}
        for key in ("mask_dataset", "source_seed", "method", "match_epoch"):
            arguments[key] = mask_info[key]
        arguments |= {"weights": start["sha256"], "mask": mask_info["sha256"]}
        arguments["tag"] = cli.joined_tag(mask_info.get("tag"), dense.get("tag"), args.tag)
        if runs.is_finished(folder, arguments):
            runs.print_finished(folder, __file__)
        else:
            pending.append((folder, arguments, start, mask_info))
    if not pending:
        return

    device = pick_device(args.device)
    data = load_data(dataset, args.data_dir, device, args.workers)
    data.steps(shared["batch_size"])  # raises UserError if there are too few images
    options = cli.training_options(args, device)
    momentum, decay = shared["momentum"], shared["weight_decay"]
    optimiser = partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)

    def run(folder: Path, arguments: dict[str, Any], start: dict, mask_info: dict) -> None:
        if runs.is_finished(folder, arguments):  # by another command, meanwhile
            return runs.print_finished(folder, __file__)
        rewind, model = arguments["rewind"], build_model(**model_config, seed=dense["seed"])
        weights = start_weights(start["state_dict"], mask_info, args.signs, args.fan_in)
        model.load_state_dict(weights)
        schedule, lr, warmup = (arguments[key] for key in ("schedule", "lr", "warmup"))
        stamp, diverged = runs.claim(folder, arguments, __file__), None
        try:
            rows = train(
                model,
                data,
                learning_rates(schedule, lr, arguments["epochs"] - rewind, warmup),
                make_optimiser=optimiser,
                augment=None,
                loss_fn=nn.functional.cross_entropy,
                name=f"{args.arm} {mask_info['source_seed']}-{dense['seed']} {folder.name}",
                folder=folder,
                seed=stage_seed(arguments["seed"], "sparse"),
                batch_size=arguments["batch_size"],
                first_epoch=rewind,
                mask=mask_info["mask"],
                **options,
            )
            final = {key: dense[key] for key in ("model", "dataset", "seed")} | stamp
            final |= {"epoch": arguments["epochs"], "tag": arguments["tag"]}
            final |= {"mask": mask_info["mask"], "state_dict": cpu_state(model)}
            checkpoint.save(final, paths.final_file(folder))
        except Diverged as error:  # a result: naive VGG11 is unstable at 95% in the paper, too
            print(f"{error}; this is recorded as the run's result")
            rows, diverged = error.rows, error.rows[-1]["epoch"]
        extra = {"diverged": diverged, "sparsity_total": mask_info["sparsity_total"]}
        extra["precision"] = options["precision"]
        extra |= {key: mask_info.get(key) for key in ("imp", "align")}
        extra["mask_code"] = mask_info.get("mask_code", mask_info.get("code"))
        extra["dense"] = dense_arguments | {"precision": dense["result"]["precision"]}
        extra["dense"]["checksum"] = dataset["checksum"]
        runs.finish(folder, "train_sparse", arguments, rows, device, stamp, **extra)

    jobs = {str(job[0]): partial(run, *job) for job in pending}
    run_all(jobs, args.parallel, width, data)


def start_weights(
    weights: dict[str, Tensor], mask_info: dict[str, Any], signs: bool, fan_in: bool
) -> dict[str, Tensor]:
    """Mask the weights of the rewind epoch; optionally transfer signs and rescale by fan-in."""
    masked = masking.apply(weights, mask_info["mask"])
    if signs:
        masked |= masking.with_signs(masked, mask_info["signs"])
    if fan_in:
        masked |= masking.rescale_fan_in(masked, mask_info["mask"])
    return masked


if __name__ == "__main__":
    cli.run(main, torchrun=True)
