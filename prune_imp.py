"""Stage 2: iterative magnitude pruning of a dense network; one chain gives a mask for every sparsity.

    python prune_imp.py --dense runs/dense/seed0 --sparsity 0.8 0.9 0.95 0.97 --out runs/imp/seed0

Each round removes 20% of the remaining weights, over all pruned layers at once, then fine-tunes (IMP-FT). A
round that would pass an asked sparsity stops exactly at it, and the chain goes on from there. Writes
mask_0.80.pt (the mask, and the signs of the dense weights) and sparse_0.80.pt (the pruned network) for each
sparsity, log.csv (a row a round) and result.json. Called again with more sparsities it goes on from the
sparsest network that still has enough weights; a run that was cut off goes on from its last epoch.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import checkpoint, cli, masking
from common.data import reader
from common.errors import UserError
from common.models import build_model
from common.parallel import run_all
from common.training import cpu_state, learning_rates, pick_device, pick_precision, train

PRUNED_A_ROUND = 0.2


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--dense", type=Path, nargs="+", required=True, help="folder of a finished dense run; a chain each"
    )
    parser.add_argument(
        "--sparsity", type=cli.share, nargs="+", required=True, metavar="S", help="of the pruned layers"
    )
    parser.add_argument(
        "--rewind", type=cli.natural, metavar="K", help="rewind weights to epoch K before each training"
    )
    parser.add_argument("--one-shot", action="store_true", help="prune to each sparsity in a single round")
    parser.add_argument("--keep-rounds", action="store_true", help="keep round_NN.pt, the network after every round")
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="folder for masks and networks, one a chain")
    cli.add_training(parser, "imp")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    if args.rewind is not None and any(
        value is not None for value in (args.epochs, args.lr, args.schedule, args.warmup)
    ):
        parser.error("--rewind trains on the dense run's schedule: leave out --epochs, --lr, --schedule and --warmup")
    if len(args.dense) != len(args.out) or len(set(args.out)) != len(args.out):
        parser.error("--out: one folder of its own for each of --dense")
    args.sparsity = sorted(set(args.sparsity))
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    read = reader(args.data_dir, device, args.workers)
    chains = {}
    for dense, out in zip(args.dense, args.out):
        if chain := prepare(argparse.Namespace(**vars(args) | {"dense": dense, "out": out}), device, read):
            chains[str(out)] = chain
    if chains:
        one = checkpoint.load_dense(args.dense[0])
        run_all(chains, args.parallel, one["model"]["width"], read(one["dataset"]))


def prepare(args: argparse.Namespace, device: torch.device, read: Callable) -> Callable[[], None] | None:
    """Read and check the inputs of one chain; what runs it, or None when it is finished."""
    dense = checkpoint.load_dense(args.dense)
    recipe = dense["result"]["arguments"]
    rewound = None
    if args.rewind is not None:  # what is not given is the dense run's
        rewound = checkpoint.load_dense(args.dense, args.rewind)["state_dict"]
        vars(args).update({name: recipe[name] for name in cli.PAPER["imp"] if getattr(args, name) is None})
        if args.rewind >= args.epochs:
            raise UserError(f"--rewind {args.rewind} is not below the {args.epochs} epochs of {args.dense}")
    cli.paper_defaults(args, "imp", dense["dataset"]["name"])

    arguments = {"dense": dense["sha256"]} | cli.hyper(
        args, "rewind", "one_shot", "keep_rounds", "epochs", "lr", "schedule", "warmup", "weight_decay", "batch_size", "momentum", "precision"
    )  # fmt: skip
    finished = checkpoint.is_finished(args.out, arguments)
    missing = [s for s in args.sparsity if not checkpoint.mask_file(args.out, s).is_file()]
    if finished and not missing:
        print(f"{args.out} is finished: nothing to do")
        return None

    model = build_model(**dense["model"], seed=dense["seed"])
    names = masking.prunable(model)
    everything = masking.dense_mask(dense["state_dict"], names)
    total = masking.size(everything)
    goals = {sparsity: masking.keep_count(total, sparsity) for sparsity in args.sparsity}
    if not 0 < min(goals.values()) <= max(goals.values()) < total:
        raise UserError(f"--sparsity {args.sparsity}: one of them keeps all or none of the {total} weights")
    reached = max((float(path.stem.split("_")[1]) for path in args.out.glob("mask_*.pt")), default=0)
    if args.keep_rounds and min(missing, default=1) < reached:
        raise UserError(
            f"the chain in {args.out} has passed {min(missing)} and its rounds are kept: choose another --out"
        )

    precision = pick_precision(args.precision, device)
    data = read(dense["dataset"])
    data.steps(args.batch_size)
    rates = learning_rates(args.schedule, args.lr, args.epochs, args.warmup)[args.rewind or 0 :]

    def prune_round(network: dict[str, Any], keep: int) -> dict[str, Any]:
        """Prune `network` to `keep` weights and train it; return the new network."""
        number = network["round"] + 1
        mask = masking.prune_by_magnitude(network["state_dict"], network["mask"], keep)
        model.load_state_dict(masking.apply(rewound or network["state_dict"], mask))
        # Fine-tuning goes on counting epochs where the dense run ended, so that no round repeats a data order.
        first_epoch = recipe["epochs"] + (number - 1) * args.epochs if args.rewind is None else args.rewind
        rows = train(
            model, data, rates, name=f"IMP seed {dense['seed']} round {number:2d} to {masking.sparsity(mask):.2%}", folder=args.out,
            seed=dense["seed"], batch_size=args.batch_size, momentum=args.momentum, weight_decay=args.weight_decay,
            precision=precision, first_epoch=first_epoch, mask=mask, compiled=args.compile, progress=args.parallel is None,
        )  # fmt: skip
        row = {
            "round": number,
            "sparsity": masking.sparsity(mask),
            "sparsity_total": masking.sparsity_total(mask, model),
            "kept": keep,
        }
        row |= checkpoint.metrics(rows[-1])
        row |= {"seconds": sum(row["seconds"] for row in rows)}
        return about | {"state_dict": cpu_state(model), "mask": mask, "round": number, "rows": [*network["rows"], row]}

    about = {key: dense[key] for key in ("model", "dataset", "seed", "epoch")}
    start = about | {"state_dict": dense["state_dict"], "mask": everything, "round": 0, "rows": []}

    def run() -> None:
        checkpoint.claim(args.out, arguments)
        for sparsity in missing:
            goal, stops = goals[sparsity], [other for other in goals.values() if other > goals[sparsity]]
            network = start if args.one_shot else sparsest(args.out, goal, stops) or start
            while (left := masking.kept(network["mask"])) > goal:
                step = max(1, round(PRUNED_A_ROUND * left))
                network = prune_round(network, goal if args.one_shot else max(goal, left - step))
                checkpoint.save_csv(network["rows"], args.out / "log.csv")
                if not args.one_shot:
                    checkpoint.save(network, args.out / f"round_{network['round']:02d}.pt")
            checkpoint.save(network, args.out / f"sparse_{checkpoint.label(sparsity)}.pt")
            masks = {
                "mask": network["mask"], "signs": masking.signs(dense["state_dict"], names), "sparsity": masking.sparsity(network["mask"]),
                "sparsity_total": masking.sparsity_total(network["mask"], model), "model": dense["model"], "dataset": dense["dataset"],
                "mask_dataset": dense["dataset"]["name"], "source_seed": dense["seed"], "target_seed": None, "method": None, "match_epoch": None,
            }  # fmt: skip
            checkpoint.save(masks, checkpoint.mask_file(args.out, sparsity))

        chains = [checkpoint.load(path)["rows"] for path in args.out.glob("sparse_*.pt")]
        rows = sorted({row["kept"]: row for chain in chains for row in chain}.values(), key=lambda row: -row["kept"])
        checkpoint.finish(args.out, "prune_imp", arguments, rows, device, precision)
        kept = range(rows[-1]["round"] + 1) if args.keep_rounds else ()  # later ones are of a chain that was given up
        checkpoint.remove(path for path in args.out.glob("round_*.pt") if int(path.stem.split("_")[1]) not in kept)

    return run


def sparsest(folder: Path, goal: int, stops: list[int]) -> dict[str, Any] | None:
    """The sparsest network in `folder` from which the chain can go on to `goal` weights, or None.

    A round that an unfinished chain left does only if that chain stopped at each count in `stops` that it passed.
    """
    best, fewest = None, float("inf")
    for path in [*folder.glob("sparse_*.pt"), *folder.glob("round_*.pt")]:
        network = checkpoint.load(path, ("mask", "round", "rows"))
        left, passed = masking.kept(network["mask"]), {row["kept"] for row in network["rows"]}
        whole = path.name.startswith("sparse") or all(stop in passed for stop in stops if stop >= left)
        if whole and goal <= left < fewest:
            best, fewest = network, left
    return best


if __name__ == "__main__":
    cli.run(main, spreads=True)
