"""Stage 1: train dense networks from seeds and keep their weights at the rewind epochs.

    python train_dense.py --dataset cifar10 --model resnet20 --width 1 --seed 0 1 --out runs/dense

Writes runs/dense/seed0/epoch_0000.pt (the initialisation), the epochs of --save-epochs, the last
one, log.csv (a row an epoch) and, last of all, result.json. A seed fixes initialisation, data order
and augmentation. Called again it does what is missing; a run that was cut off goes on.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint, cli, paths, runs
from common.data import DATASETS, load_data, stage_seed
from common.models import MODELS, build_model
from common.runtime.device import pick_device
from common.runtime.parallel import run_all
from common.training import cpu_state, learning_rates, train


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="glyphs", help="default: %(default)s (generated)")
    add("--image-size", type=cli.pixels, metavar="PX", help="resize small-image sets")
    add("--limit-train", type=cli.positive, metavar="N", help="N training images, class-balanced")
    add("--model", choices=MODELS, default="resnet20", help="default: %(default)s")
    add("--width", type=cli.above_0, default=1, help="times all channel counts")
    add("--seed", type=cli.natural, nargs="+", default=[0], help="one network a seed (default: 0)")
    add("--save-epochs", type=cli.natural, nargs="+", metavar="K", help="beside the paper's")
    add("--out", type=Path, required=True, help="folder of the runs; each goes to its own seed<N>/")
    cli.add_training(parser, "dense")
    cli.add_device(parser)
    cli.add_data(parser, "where the data set lies or is downloaded to (default: data)")
    args = parser.parse_args()
    vars(args).update(cli.settings(args, "dense", args.dataset))
    asked = args.save_epochs or []
    if max(asked, default=0) > args.epochs:
        parser.error(f"--save-epochs {max(asked)} is beyond the {args.epochs} --epochs")
    papers = cli.paper_value(cli.REWIND_EPOCHS, args.dataset)
    kept = {0, *asked, args.epochs, *(k for k in papers if k < args.epochs)}
    args.save_epochs = sorted(kept)
    return args


def main() -> None:
    args = parse_args()
    shared = cli.experiment(args, "seed")
    # Elsewhere the name says which data.
    in_folder = args.data_dir and args.dataset == "folder"
    shared["data_dir"] = str(Path(args.data_dir)) if in_folder else None
    todo = []
    for seed in args.seed:
        folder, arguments = paths.dense_folder(args.out, seed), shared | {"seed": seed}
        before = runs.recorded_arguments(folder).get("save_epochs", [])
        if set(args.save_epochs) <= set(before):
            arguments["save_epochs"] = before  # a run that keeps more is no other experiment
        if runs.is_finished(folder, arguments):
            runs.print_finished(folder, __file__)
        else:
            todo.append((folder, arguments))
    if not todo:
        return

    device = pick_device(args.device)
    wanted = {"name": args.dataset, "image_size": args.image_size, "limit_train": args.limit_train}
    data = load_data(wanted, args.data_dir, device, args.workers)
    data.steps(args.batch_size)  # a UserError where the images are too few
    rates = learning_rates(args.schedule, args.lr, args.epochs, args.warmup)
    momentum, decay = args.momentum, args.weight_decay
    optimiser = partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)
    how = cli.how_to_train(args, device)
    model = {"name": args.model, "width": args.width, "classes": data.description["classes"]}
    model["input_shape"] = list(data.input_shape)

    def run(folder: Path, arguments: dict[str, Any]) -> None:
        seed = arguments["seed"]
        network = build_model(**model, seed=seed)
        stamp = runs.claim(folder, arguments, __file__)
        header = {"model": model, "dataset": data.description, "seed": seed} | stamp
        header["tag"] = args.tag

        def keep(epoch: int) -> None:
            if epoch in arguments["save_epochs"]:
                weights = header | {"epoch": epoch, "state_dict": cpu_state(network)}
                checkpoint.save(weights, paths.epoch_file(folder, epoch))

        if not (folder / "resume.pt").is_file():  # what goes on began from what is there
            keep(0)
        rows = train(
            network,
            data,
            rates,
            make_optimiser=optimiser,
            augment=None,
            loss_fn=nn.functional.cross_entropy,
            name=f"{args.model}x{args.width:g} seed {seed}",
            folder=folder,
            seed=stage_seed(seed, "dense"),
            batch_size=args.batch_size,
            at_epoch=keep,
            **how,
        )
        extra = {key: data.description[key] for key in ("classes", "images", "checksum")}
        extra |= {"precision": how["precision"], "kept": checkpoint.digests(folder)}
        runs.finish(folder, "train_dense", arguments, rows, device, stamp, **extra)

    run_all({str(job[0]): partial(run, *job) for job in todo}, args.parallel, args.width, data)


if __name__ == "__main__":
    cli.run(main, torchrun=True)
