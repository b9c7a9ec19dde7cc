"""Stage 1: train dense networks and save their weights at the rewind epochs.

    python train_dense.py --dataset cifar10 --model resnet20 --width 1 --seed 0 1 --out runs/dense

Writes runs/dense/seed0/epoch_0000.pt (the initialisation), the epochs of --save-epochs, the last
epoch, log.csv (a row per epoch) and finally result.json. The seed determines initialisation, data
order and augmentation. Run again, it trains what is missing and resumes what was interrupted.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint, cli, masking, paths, runs
from common.data import DATASETS, load_data, stage_seed
from common.errors import UserError
from common.models import MODELS, build_model
from common.runtime.device import pick_device
from common.runtime.parallel import run_all
from common.training import cpu_state, learning_rates, train


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="glyphs", help="default: %(default)s (generated)")
    add("--image-size", type=cli.pixels, metavar="PX", help="resize small-image data sets")
    add("--limit-train", type=cli.positive, metavar="N", help="N training images, class-balanced")
    add("--model", choices=MODELS, default="resnet20", help="default: %(default)s")
    add("--width", type=cli.positive_float, default=1, help="multiplies all channel counts")
    add("--seed", type=cli.natural, nargs="+", default=[0], help="one network each (default: 0)")
    several = {"nargs": "+", "action": "extend"}  # run_all.sh gives the flag, and so may its user
    add("--save-epochs", type=cli.natural, metavar="K", help="added to the paper's", **several)
    add("--out", type=Path, required=True, help="output folder; each run goes to its seed<N>/")
    cli.add_training(parser, "dense")
    cli.add_device(parser)
    cli.add_data(parser, "folder of the data set, or for its download (default: data)")
    args = parser.parse_args()
    vars(args).update(cli.hyperparameters(args, "dense", args.dataset))
    requested = args.save_epochs or []
    if max(requested, default=0) > args.epochs:
        parser.error(f"--save-epochs {max(requested)} is beyond the {args.epochs} --epochs")
    rewind_epochs = cli.paper_value(cli.REWIND_EPOCHS, args.dataset)
    saved = {0, *requested, args.epochs, *(k for k in rewind_epochs if k < args.epochs)}
    args.save_epochs = sorted(saved)
    return args


def main() -> None:
    args = parse_args()
    shared = cli.experiment_arguments(args, "seed")
    # The other data sets are identified by their name.
    is_folder = args.data_dir and args.dataset == "folder"
    shared["data_dir"] = str(Path(args.data_dir)) if is_folder else None
    pending = []
    for seed in args.seed:
        folder, arguments = paths.dense_folder(args.out, seed), shared | {"seed": seed}
        recorded_epochs = runs.recorded_arguments(folder).get("save_epochs", [])
        if set(args.save_epochs) <= set(recorded_epochs):
            # A run that saves more epochs is the same experiment.
            arguments["save_epochs"] = recorded_epochs
        if runs.is_finished(folder, arguments):
            runs.print_finished(folder, __file__)
        else:
            pending.append((folder, arguments))
    if not pending:
        return

    device = pick_device(args.device)
    dataset = {"name": args.dataset, "image_size": args.image_size, "limit_train": args.limit_train}
    data = load_data(dataset, args.data_dir, device, args.workers)
    data.steps(args.batch_size)  # raises UserError if there are too few images
    rates = learning_rates(args.schedule, args.lr, args.epochs, args.warmup)
    momentum, decay = args.momentum, args.weight_decay
    optimiser = partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)
    options = cli.training_options(args, device)
    model_config = {"name": args.model, "width": args.width, "classes": data.description["classes"]}
    model_config["input_shape"] = list(data.input_shape)

    def run(folder: Path, arguments: dict[str, Any]) -> None:
        if runs.is_finished(folder, arguments):  # by another command, meanwhile
            return runs.print_finished(folder, __file__)
        seed = arguments["seed"]
        model = build_model(**model_config, seed=seed)
        masking.prunable(model)  # raises UserError if stage 2 cannot prune it
        stamp = runs.claim(folder, arguments, __file__)
        metadata = {"model": model_config, "dataset": data.description, "seed": seed} | stamp
        metadata["tag"] = args.tag

        def save_weights(epoch: int) -> None:
            if epoch in arguments["save_epochs"]:
                weights = metadata | {"epoch": epoch, "state_dict": cpu_state(model)}
                checkpoint.save(weights, paths.epoch_file(folder, epoch))

        if (folder / "resume.pt").is_file():  # a resumed run has saved its initialisation
            began = checkpoint.load(paths.epoch_file(folder, 0), ("dataset",))["dataset"]
            if any(began[key] != data.description[key] for key in ("images", "checksum")):
                raise UserError(f"{folder} began with other data: restore them, or remove it")
        else:
            save_weights(0)
        rows = train(
            model,
            data,
            rates,
            make_optimiser=optimiser,
            augment=None,
            loss_fn=nn.functional.cross_entropy,
            name=f"{args.model}x{args.width:g} seed {seed}",
            folder=folder,
            seed=stage_seed(seed, "dense"),
            batch_size=args.batch_size,
            at_epoch=save_weights,
            **options,
        )
        extra = {key: data.description[key] for key in ("classes", "images", "checksum")}
        extra |= {"precision": options["precision"], "kept": checkpoint.digests(folder)}
        runs.finish(folder, "train_dense", arguments, rows, device, stamp, **extra)

    jobs = {str(folder): partial(run, folder, arguments) for folder, arguments in pending}
    run_all(jobs, args.parallel, args.width, data)


if __name__ == "__main__":
    cli.run(main, torchrun=True)
