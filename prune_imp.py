"""Stage 2: iterative magnitude pruning (IMP) of a dense network; one chain for all sparsities.

    python prune_imp.py --dense runs/dense/seed0 --sparsity 0.8 0.9 0.95 0.97 --out runs/imp/seed0

Each round of the chain prunes exactly 20% of the remaining weights, over all pruned layers at once,
then fine-tunes (IMP-FT). Each asked sparsity branches off: one round to exactly its number of
weights, from the last round of the chain that has more. So a mask depends on its sparsity alone.
Writes mask_0.80.pt (the mask, and the signs of the dense weights) and sparse_0.80.pt (the pruned
network) for each sparsity, log.csv (a row a round) and result.json. Called again with more
sparsities it goes on from the rounds that are kept; a run that was cut off goes on.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import checkpoint, cli, masking, paths, runs
from common.data import Resident, Streamed, reader, stage_seed
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device
from common.runtime.parallel import run_all
from common.training import cpu_state, learning_rates, train

PRUNED_A_ROUND = 0.2  # of the remaining weights

Network = dict[str, Any]  # a checkpoint with mask, round, and the rows of all rounds so far


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--dense", type=Path, nargs="+", required=True, help="finished dense runs; a chain each")
    add(
        "--sparsity", type=cli.share, nargs="+", required=True, metavar="S", help="of pruned layers"
    )
    add("--rewind", type=cli.natural, metavar="K", help="to epoch K before each training")
    add("--one-shot", action="store_true", help="prune to each sparsity in a single round")
    add("--keep-rounds", action="store_true", help="keep round_NN.pt, the network after each round")
    add("--out", type=Path, nargs="+", required=True, help="folder for masks, one a chain")
    cli.add_training(parser, "imp")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    scheduled = (args.epochs, args.lr, args.schedule, args.warmup)
    if args.rewind is not None and scheduled != (None,) * 4:
        parser.error("--rewind trains on the dense run's schedule: leave out its flags")
    if len(args.dense) != len(args.out) or len(set(args.out)) != len(args.out):
        parser.error("--out: one folder of its own for each of --dense")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    read = reader(args.data_dir, device, args.workers)
    chains = {}
    for folder, out in zip(args.dense, args.out):
        dense = checkpoint.load_dense(folder)
        recipe = dense["result"]["arguments"]
        rewound = checkpoint.load_dense(folder, args.rewind) if args.rewind is not None else None
        settings = cli.settings(args, "imp", dense["dataset"]["name"], recipe if rewound else {})
        if rewound and args.rewind >= settings["epochs"]:
            raise UserError(f"--rewind {args.rewind} is not below the {settings['epochs']} epochs")
        arguments = {
            "dense": dense["sha256"],
            "tag": cli.joined_tag(dense.get("tag"), args.tag),
        } | settings
        arguments |= cli.hyper(args, "rewind", "one_shot", "keep_rounds", "precision")
        finished = runs.is_finished(out, arguments)
        missing = [s for s in sorted({*args.sparsity}) if not paths.mask_file(out, s).is_file()]
        if finished and not missing:
            runs.say_finished(out, __file__)
            continue
        data = read(dense["dataset"])
        data.steps(settings["batch_size"])
        names = masking.prunable(build_model(**dense["model"]))
        start = {key: dense[key] for key in ("model", "dataset", "seed", "epoch", "state_dict")}
        start |= {"mask": masking.dense_mask(dense["state_dict"], names), "round": 0, "rows": []}
        start |= {"signs": masking.signs(dense["state_dict"], names), "tag": arguments["tag"]}
        goals = masking.keep_counts(start["mask"], missing)
        how = cli.how_to_train(args, device)
        chains[str(out)] = partial(prune_chain, start, rewound, goals, out, arguments, data, how)
    if chains:
        run_all(chains, args.parallel, dense["model"]["width"], data)


def prune_chain(
    start: Network,
    rewound: Network | None,
    goals: dict[float, int],
    out: Path,
    arguments: dict[str, Any],
    data: Resident | Streamed,
    how: dict[str, Any],
) -> None:
    """Prune round after round as far as needed, with a branch to exactly each goal; write masks.

    goals: the number of weights that each sparsity keeps. rewound: the weights that every round
    trains from, in place of those that it prunes. how: further arguments of `train`.
    """
    stamp = runs.claim(out, arguments, __file__)
    model, epochs, rewind = build_model(**start["model"]), arguments["epochs"], arguments["rewind"]
    rates = learning_rates(arguments["schedule"], arguments["lr"], epochs, arguments["warmup"])
    momentum, decay = arguments["momentum"], arguments["weight_decay"]
    optimiser = partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)
    fine_tune = partial(
        train,
        model,
        data,
        rates[rewind or 0 :],
        make_optimiser=optimiser,
        augment=None,
        folder=out,
        seed=stage_seed(start["seed"], "imp"),
        batch_size=arguments["batch_size"],
        **how,
    )

    def next_round(network: Network, keep: int) -> Network:
        # Epochs go on counting where the dense run ended, so that no round repeats a data order.
        first = start["epoch"] + network["round"] * epochs if rewind is None else rewind
        tune = partial(fine_tune, first_epoch=first)
        return prune_round(network, keep, model, rewound, tune) | stamp

    share = 1 if arguments["one_shot"] else PRUNED_A_ROUND
    counts, branches = masking.plan(masking.size(start["mask"]), goals, share)
    network, more = latest(out, min(branches)) or start, {"precision": how["precision"]}
    for number in range(network["round"], max(branches) + 1):
        if number > network["round"]:
            network = next_round(network, counts[number])
            checkpoint.save(network, paths.chain_file(out))
            if arguments["keep_rounds"]:
                checkpoint.save(network, paths.round_file(out, number))
            checkpoint.save_csv(network["rows"], out / "log.csv")
        for sparsity in branches.get(number, ()):
            branch = next_round(network, goals[sparsity])
            checkpoint.save(branch, paths.imp_file(out, sparsity))
            made = {"imp": arguments | more} | stamp
            checkpoint.save(masking.entry(branch, model) | made, paths.mask_file(out, sparsity))
    histories = [checkpoint.load(path)["rows"] for path in paths.imp_files(out).values()]
    by_count = {row["kept"]: row for rows in (*histories, network["rows"]) for row in rows}
    rows = [by_count[kept] for kept in sorted(by_count, reverse=True)]
    runs.finish(out, "prune_imp", arguments, rows, data.device, stamp, **more)


def latest(folder: Path, last: int) -> Network | None:
    """The furthest network of the chain in `folder` that is not beyond round `last`, or None."""
    files = [path for path in paths.chain_files(folder) if path.is_file()]
    kept = [checkpoint.load(path, ("mask", "signs", "round", "rows")) for path in files]
    kept = [network for network in kept if network["round"] <= last]
    return max(kept, key=lambda network: network["round"], default=None)


def prune_round(
    network: Network, keep: int, model: nn.Module, rewound: Network | None, fine_tune: Callable
) -> Network:
    """Prune `network` to exactly `keep` weights and train it; returns the new network."""
    number, weights = network["round"] + 1, network["state_dict"]
    mask = masking.prune_exactly(masking.prune_by_magnitude, weights, network["mask"], keep)
    model.load_state_dict(masking.apply(rewound["state_dict"] if rewound else weights, mask))
    sparsity = masking.sparsity(mask)
    name = f"IMP seed {network['seed']} round {number:2d} to {sparsity:.2%}"
    rows = fine_tune(mask=mask, name=name)
    row = {"round": number, "sparsity": sparsity, "kept": keep}
    row |= {"sparsity_total": masking.sparsity_total(mask, model)} | runs.metrics(rows[-1])
    row |= {"seconds": sum(row["seconds"] for row in rows)}
    new = {"state_dict": cpu_state(model), "mask": mask, "round": number}
    return network | new | {"rows": [*network["rows"], row]}


if __name__ == "__main__":
    cli.run(main, torchrun=True)
