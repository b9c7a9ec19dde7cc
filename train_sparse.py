"""Stage 4: train a network under a mask, from the weights it had at a rewind epoch.

    python train_sparse.py --arm lth --weights runs/dense/seed0 --masks runs/imp/seed0 \\
        --sparsity 0.9 --rewind 0 10 25 --out runs/sparse/lth/seed0-seed0

and so `--arm naive` with --weights runs/dense/seed1, and `--arm permuted` with the masks of
runs/align/activation/seed0-seed1 as well. Controls: `shuffled` (naive, the mask shuffled within
each layer), `random-permutation` (masks from align_mask.py --method random) and `imp-target` (the
target under its own IMP mask); --signs gives the kept weights the signs of the source at its last
epoch, in any arm.

Trains one network for every (sparsity, rewind epoch k), for T - k epochs on a fresh schedule, the
mask applied after every step. Writes s0.90_k010/final.pt, log.csv and, last of all, result.json. A
run that diverges ends as a result, with the accuracy that it had then, and without final.pt. Called
again it does what is missing; a run that was cut off goes on.
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
    add = parser.add_argument
    add("--arm", choices=ARMS, required=True, help="what the run shows; must agree with the files")
    add("--weights", type=Path, required=True, help="dense run whose weights are trained")
    add("--masks", type=Path, required=True, help="folder from prune_imp.py or align_mask.py")
    add(
        "--sparsity", type=cli.share, nargs="+", required=True, metavar="S", help="with a mask each"
    )
    add("--rewind", type=cli.natural, nargs="+", required=True, metavar="K", help="kept epochs")
    add("--epochs", type=cli.positive, metavar="T", help="train T - K (default: the dense run's)")
    add("--seed", type=cli.natural, help="of order and augmentation (default: of the weights)")
    add("--signs", action="store_true", help="give kept weights the signs in the masks folder")
    add("--fan-in", action="store_true", help="scale kept weights by sqrt(fan-in / kept fan-in)")
    add("--out", type=Path, required=True, help="folder of the runs; each goes to its s<S>_k<K>/")
    cli.add_training(parser, "sparse")
    cli.add_device(parser)
    cli.add_data(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dense = checkpoint.load_dense(args.weights)
    model, dataset, recipe = dense["model"], dense["dataset"], dense["result"]["arguments"]
    shared = cli.experiment(args, "weights", "masks")
    shared |= cli.settings(args, "sparse", dataset["name"])
    shared |= {"epochs": args.epochs or recipe["epochs"], "target_seed": dense["seed"]}
    shared |= {"model": model["name"], "width": model["width"], "dataset": dataset["name"]}
    shared["seed"] = dense["seed"] if args.seed is None else args.seed

    # Read and check every input before the first run starts.
    masks = {s: load_mask(args.masks, s, args.arm, dense) for s in sorted(set(args.sparsity))}
    rewound = {k: checkpoint.load_dense(args.weights, k) for k in sorted(set(args.rewind))}
    if max(rewound) >= shared["epochs"]:
        epochs = shared["epochs"]
        raise UserError(f"--rewind {max(rewound)} leaves no epoch to train: T is {epochs}")
    todo = []
    for (sparsity, mask), (rewind, weights) in itertools.product(masks.items(), rewound.items()):
        folder = paths.sparse_folder(args.out, sparsity, rewind)
        of_mask = ("mask_dataset", "source_seed", "method", "match_epoch")
        arguments = shared | {"sparsity": sparsity, "rewind": rewind}
        arguments |= {key: mask[key] for key in of_mask}
        arguments |= {"weights": weights["sha256"], "mask": mask["sha256"]}
        arguments["tag"] = cli.joined_tag(mask.get("tag"), dense.get("tag"), args.tag)
        if runs.is_finished(folder, arguments):
            runs.print_finished(folder, __file__)
        else:
            todo.append((folder, arguments, weights, mask))
    if not todo:
        return

    device = pick_device(args.device)
    data = load_data(dataset, args.data_dir, device, args.workers)
    data.steps(shared["batch_size"])  # a UserError where the images are too few
    how = cli.how_to_train(args, device)
    momentum, decay = shared["momentum"], shared["weight_decay"]
    optimiser = partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)

    def run(folder: Path, arguments: dict[str, Any], weights: dict, mask: dict) -> None:
        rewind, network = arguments["rewind"], build_model(**model, seed=dense["seed"])
        network.load_state_dict(start_weights(weights["state_dict"], mask, args.signs, args.fan_in))
        schedule, lr, warmup = (arguments[key] for key in ("schedule", "lr", "warmup"))
        stamp, diverged = runs.claim(folder, arguments, __file__), None
        try:
            rows = train(
                network,
                data,
                learning_rates(schedule, lr, arguments["epochs"] - rewind, warmup),
                make_optimiser=optimiser,
                augment=None,
                loss_fn=nn.functional.cross_entropy,
                name=f"{args.arm} {mask['source_seed']}-{dense['seed']} {folder.name}",
                folder=folder,
                seed=stage_seed(arguments["seed"], "sparse"),
                batch_size=arguments["batch_size"],
                first_epoch=rewind,
                mask=mask["mask"],
                **how,
            )
            header = {key: dense[key] for key in ("model", "dataset", "seed")} | stamp
            header |= {"epoch": arguments["epochs"], "tag": arguments["tag"], "mask": mask["mask"]}
            checkpoint.save(header | {"state_dict": cpu_state(network)}, paths.final_file(folder))
        except Diverged as error:  # a result too: naive VGG11 is unstable at 95% in the paper
            print(f"{error}; this is recorded as the run's result")
            rows, diverged = error.rows, error.rows[-1]["epoch"]
        extra = {"diverged": diverged, "sparsity_total": mask["sparsity_total"]}
        extra |= {"precision": how["precision"]} | {key: mask.get(key) for key in ("imp", "align")}
        extra |= {"mask_code": mask.get("mask_code", mask.get("code"))}
        made_in = {"precision": dense["result"]["precision"], "checksum": dataset["checksum"]}
        extra |= {"dense": recipe | made_in}
        runs.finish(folder, "train_sparse", arguments, rows, device, stamp, **extra)

    jobs = {str(job[0]): partial(run, *job) for job in todo}
    run_all(jobs, args.parallel, model["width"], data)


def start_weights(
    weights: dict[str, Tensor], mask: dict[str, Any], signs: bool, fan_in: bool
) -> dict[str, Tensor]:
    """The masked weights at the rewind epoch, with transferred signs and rescaled as asked."""
    start = masking.apply(weights, mask["mask"])
    if signs:
        start |= masking.with_signs(start, mask["signs"])
    if fan_in:
        start |= masking.rescale_fan_in(start, mask["mask"])
    return start


if __name__ == "__main__":
    cli.run(main, torchrun=True)
