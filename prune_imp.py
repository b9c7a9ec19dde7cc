"""Stage 2: iterative magnitude pruning (IMP) of a dense network; one chain for all sparsities.

    python prune_imp.py --dense runs/dense/seed0 --sparsity 0.8 0.9 0.95 0.97 --out runs/imp/seed0

Each round prunes exactly 20% of the remaining weights, over all pruned layers at once, and trains
(IMP-FT). Each asked sparsity branches off: one round to exactly its number of weights, from the
last round of the chain that has more, so that a mask depends on its sparsity alone. Writes
mask_0.80.pt (the mask, and the signs of the dense weights) and sparse_0.80.pt (the network) for
each, log.csv (a row a round) and result.json. Called again it does what is missing, or goes on.
"""

import argparse
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from common import checkpoint, cli, masking, paths, runs
from common.data import Resident, Streamed, load_cached, stage_seed
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device
from common.runtime.parallel import run_all
from common.training import cpu_state, learning_rates, train

PRUNED_A_ROUND = 0.2  # of the remaining weights


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, several = parser.add_argument, {"nargs": "+", "required": True}
    add("--dense", type=Path, help="finished dense runs; a chain each", **several)
    add("--sparsity", type=cli.share, metavar="S", help="of the pruned layers", **several)
    add("--rewind", type=cli.natural, metavar="K", help="to epoch K before each training")
    add("--one-shot", action="store_true", help="prune to each sparsity in a single round")
    add("--keep-rounds", action="store_true", help="keep round_NN.pt, the network after each round")
    add("--out", type=Path, help="folder for masks, one a chain", **several)
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
    how = cli.how_to_train(args, device)
    chains = {}
    for folder, out in zip(args.dense, args.out):
        dense = checkpoint.load_dense(folder)
        rewound = checkpoint.load_dense(folder, args.rewind) if args.rewind is not None else None
        recipe = dense["result"]["arguments"] if rewound else None
        settings = cli.settings(args, "imp", dense["dataset"]["name"], recipe)
        if rewound and args.rewind >= settings["epochs"]:
            raise UserError(f"--rewind {args.rewind} is not below the {settings['epochs']} epochs")
        arguments = cli.experiment(args, "sparsity") | settings | {"dense": dense["sha256"]}
        arguments["tag"] = cli.joined_tag(dense.get("tag"), args.tag)
        missing = [s for s in sorted({*args.sparsity}) if not paths.mask_file(out, s).is_file()]
        if runs.is_finished(out, arguments):
            if not missing:
                runs.say_finished(out, __file__)
                continue
            if made_by := runs.other_code(out, __file__):
                raise UserError(f"{out} was made by {made_by}: choose another --out, and a --tag")
        data = load_cached(dense["dataset"], args.data_dir, device, args.workers)
        data.steps(settings["batch_size"])  # a UserError where the images are too few
        names, weights = masking.prunable(build_model(**dense["model"])), dense["state_dict"]
        start = {key: dense[key] for key in checkpoint.WEIGHTS}
        start |= {"mask": masking.dense_mask(weights, names), "round": 0, "rows": []}
        start |= {"signs": masking.signs(weights, names), "tag": arguments["tag"]}
        chains[str(out)] = partial(prune_chain, start, rewound, missing, out, arguments, data, how)
    if chains:
        run_all(chains, args.parallel, dense["model"]["width"], data)


def prune_chain(
    start: dict[str, Any],
    rewound: dict[str, Any] | None,
    goals: list[float],
    out: Path,
    arguments: dict[str, Any],
    data: Resident | Streamed,
    how: dict[str, Any],
) -> None:
    """Prune and train round after round, with a branch to each goal, a sparsity; write masks.

    `start` is a checkpoint with mask, signs, round, and the rows of all rounds so far; `rewound`
    holds the weights that every round trains from, in place of those that it prunes.
    """
    total = masking.size(start["mask"])
    rounds = masking.plan(total, goals, 1 if arguments["one_shot"] else PRUNED_A_ROUND)
    model, epochs, rewind = build_model(**start["model"]), arguments["epochs"], arguments["rewind"]
    rates = learning_rates(arguments["schedule"], arguments["lr"], epochs, arguments["warmup"])
    momentum, decay = arguments["momentum"], arguments["weight_decay"]
    optimiser = partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)
    first_goal = min((row[0] for row in rounds if row[2]), default=inf)
    chain = masking.latest(out, start, first_goal)
    stamp, extra = runs.claim(out, arguments, __file__), {"precision": how["precision"]}
    for number, keep, goal in [row for row in rounds if row[0] > chain["round"]]:
        weights = chain["state_dict"]
        mask = masking.prune_exactly(masking.prune_by_magnitude, weights, chain["mask"], keep)
        model.load_state_dict(masking.apply(rewound["state_dict"] if rewound else weights, mask))
        # Without --rewind epochs go on counting, so that no round repeats a data order.
        log = train(
            model,
            data,
            rates[rewind or 0 :],
            make_optimiser=optimiser,
            augment=None,
            name=f"IMP seed {start['seed']} round {number:2d} to {keep} of {total} weights",
            folder=out,
            seed=stage_seed(start["seed"], "imp"),
            batch_size=arguments["batch_size"],
            first_epoch=rewind if rewound else start["epoch"] + chain["round"] * epochs,
            mask=mask,
            **how,
        )
        row = {"round": number, "sparsity": masking.sparsity(mask), "kept": keep}
        row |= {"sparsity_total": masking.sparsity_total(mask, model)} | runs.metrics(log[-1])
        row["seconds"] = sum(epoch["seconds"] for epoch in log)
        network = chain | stamp | {"state_dict": cpu_state(model), "mask": mask, "round": number}
        network["rows"] = [*chain["rows"], row]
        if goal:
            checkpoint.save(network, paths.imp_file(out, goal))
            entry = masking.entry(network, model) | {"imp": arguments | extra} | stamp
            checkpoint.save(entry, paths.mask_file(out, goal))
        else:
            chain = network
            checkpoint.save(chain, paths.round_file(out, number))
    histories = [checkpoint.load(path, ("rows",))["rows"] for path in paths.imp_files(out).values()]
    by_count = {row["kept"]: row for rows in (*histories, chain["rows"]) for row in rows}
    rows = [by_count[kept] for kept in sorted(by_count, reverse=True)]
    if not arguments["keep_rounds"]:
        # But for the last: higher sparsities go on from there.
        checkpoint.remove([*paths.round_files(out).values()][:-1])
    runs.finish(out, "prune_imp", arguments, rows, data.device, stamp, **extra)


if __name__ == "__main__":
    cli.run(main, torchrun=True)
