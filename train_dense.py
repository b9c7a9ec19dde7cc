"""Stage 1: train dense networks from seeds and keep their weights at the rewind epochs.

    python train_dense.py --dataset cifar10 --model resnet20 --width 1 --seed 0 1 --out runs/dense

Writes runs/dense/seed0/epoch_0000.pt (the initialisation), the epochs of --save-epochs, the last one,
log.csv (a row an epoch) and, last of all, result.json. A seed fixes initialisation, data order and
augmentation. Called again it does what is missing; a run that was cut off goes on from its last epoch.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from common import checkpoint, cli
from common.data import DATASETS, load_data
from common.models import MODELS, build_model
from common.parallel import run_all
from common.training import cpu_state, learning_rates, pick_device, pick_precision, train


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="glyphs", help="default: %(default)s (generated)")
    parser.add_argument("--image-size", type=cli.number(int, 8), metavar="PX", help="resize small-image sets")
    parser.add_argument("--limit-train", type=cli.positive, metavar="N", help="use N training images, class-balanced")
    parser.add_argument("--model", choices=MODELS, default="resnet20", help="default: %(default)s")
    parser.add_argument("--width", type=cli.number(float, 0, open_low=True), default=1, help="times all channel counts")
    parser.add_argument("--seed", type=cli.natural, nargs="+", default=[0], help="one network a seed (default: 0)")
    parser.add_argument("--save-epochs", type=cli.natural, nargs="+", metavar="K", help="default: the paper's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; each goes to its own seed<N>/")
    cli.add_training(parser, "dense")
    cli.add_device(parser)
    cli.add_data(parser, "where the data set lies or is downloaded to (default: data)")
    args = parser.parse_args()
    cli.paper_defaults(args, "dense", args.dataset)
    if args.save_epochs is None:
        args.save_epochs = [k for k in cli.paper_value(cli.REWIND_EPOCHS, args.dataset) if k < args.epochs]
    elif max(args.save_epochs) > args.epochs:
        parser.error(f"--save-epochs {max(args.save_epochs)} is beyond the {args.epochs} --epochs")
    args.save_epochs = sorted({0, *args.save_epochs, args.epochs})
    return args


def main() -> None:
    args = parse_args()
    arguments = cli.hyper(
        args, "dataset", "image_size", "limit_train", "model", "width", "epochs", "lr", "schedule", "warmup",
        "weight_decay", "batch_size", "momentum", "precision", "save_epochs",
    )  # fmt: skip
    # Elsewhere the name says which data.
    arguments["data_dir"] = str(Path(args.data_dir)) if args.data_dir and args.dataset == "folder" else None
    todo = []
    for seed in args.seed:
        folder, own = args.out / f"seed{seed}", arguments | {"seed": seed}
        before = checkpoint.recorded(folder).get("save_epochs", [])
        if set(args.save_epochs) <= set(before):
            own["save_epochs"] = before  # a run that keeps more is no other experiment
        if checkpoint.is_finished(folder, own):
            print(f"{folder} is finished: nothing to do")
        else:
            todo.append((folder, own))
    if not todo:
        return

    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    data = load_data(args.dataset, args.data_dir, args.image_size, args.limit_train, device, workers=args.workers)
    data.steps(args.batch_size)
    rates = learning_rates(args.schedule, args.lr, args.epochs, args.warmup)
    classes = data.description["classes"]

    def run(folder: Path, arguments: dict[str, Any]) -> None:
        seed = arguments["seed"]
        model = build_model(args.model, args.width, classes, data.input_shape, seed)
        checkpoint.claim(folder, arguments)
        shape = list(data.input_shape)
        about = {
            "model": {"name": args.model, "width": args.width, "classes": classes, "input_shape": shape},
            "dataset": data.description,
            "seed": seed,
        }

        def keep(epoch: int) -> None:
            if epoch in arguments["save_epochs"]:
                weights = about | {"epoch": epoch, "state_dict": cpu_state(model)}
                checkpoint.save(weights, checkpoint.epoch_file(folder, epoch))

        keep(0)
        rows = train(
            model, data, rates, name=f"{args.model}x{args.width:g} seed {seed}", folder=folder, seed=seed,
            batch_size=args.batch_size, momentum=args.momentum, weight_decay=args.weight_decay, precision=precision,
            at_epoch=keep, compiled=args.compile, progress=args.parallel is None,
        )  # fmt: skip
        checkpoint.finish(folder, "train_dense", arguments, rows, device, precision)

    run_all({str(folder): partial(run, folder, own) for folder, own in todo}, args.parallel, args.width, data)


if __name__ == "__main__":
    cli.run(main, spreads=True)
