"""Stage 2: prune dense networks by iterative magnitude pruning (IMP), to one or more sparsities.

    python prune_imp.py --dense runs/dense/seed0 --sparsity 0.8 0.9 0.95 0.97 --out runs/imp/seed0

Each round of the chain prunes 20% of the remaining weights, over all pruned layers at once, and
trains (IMP-FT). A sparsity branches off the last of these rounds that keeps more weights: another
round prunes to its exact number, so that no mask depends on the other sparsities. Writes for each
sparsity mask_0.80.pt (mask, and signs of the dense weights) and sparse_0.80.pt (the network),
log.csv (a row per round) and finally result.json. Run again, it completes what is missing.
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

PRUNE_FRACTION = 0.2  # of the remaining weights, in each round


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, several = parser.add_argument, {"nargs": "+", "required": True}
    add("--dense", type=Path, help="finished dense runs, one IMP chain each", **several)
    add("--sparsity", type=cli.fraction, metavar="S", help="of the pruned layers", **several)
    add("--rewind", type=cli.natural, metavar="K", help="train from epoch K, as the dense run did")
    add("--one-shot", action="store_true", help="prune to each sparsity in a single round")
    add("--keep-rounds", action="store_true", help="keep round_NN.pt, the network after each round")
    add("--out", type=Path, help="folders for the masks, one for each of --dense", **several)
    cli.add_training(parser, "imp")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    schedule = (args.epochs, args.lr, args.schedule, args.warmup)
    if args.rewind is not None and schedule != (None,) * 4:
        parser.error("--rewind trains on the dense run's schedule: leave out its flags")
    if len(args.dense) != len(args.out) or len(set(args.out)) != len(args.out):
        parser.error("--out: one folder of its own for each of --dense")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    options = cli.training_options(args, device)
    jobs = {}
    for folder, out in zip(args.dense, args.out):
        dense = checkpoint.load_dense(folder)
        rewound = checkpoint.load_dense(folder, args.rewind) if args.rewind is not None else None
        defaults = dense["result"]["arguments"] if rewound else None
        hyperparameters = cli.hyperparameters(args, "imp", dense["dataset"]["name"], defaults)
        if rewound and args.rewind >= (epochs := hyperparameters["epochs"]):
            raise UserError(f"--rewind {args.rewind} is not below the {epochs} epochs")
        arguments = cli.experiment_arguments(args, "sparsity") | hyperparameters
        arguments |= {"dense": dense["sha256"], "tag": cli.joined_tag(dense.get("tag"), args.tag)}
        missing = [s for s in sorted({*args.sparsity}) if not paths.mask_file(out, s).is_file()]
        if runs.is_finished(out, arguments):
            if not missing:
                runs.print_finished(out, __file__)
                continue
            if code := runs.other_code(out, __file__):
                raise UserError(f"{out} was made by {code}: choose another --out, and a --tag")
        data = load_cached(dense["dataset"], args.data_dir, device, args.workers)
        data.steps(hyperparameters["batch_size"])  # raises UserError if there are too few images
        names, weights = masking.prunable(build_model(**dense["model"])), dense["state_dict"]
        start = {key: dense[key] for key in checkpoint.WEIGHTS}
        start |= {"mask": masking.dense_mask(weights, names), "round": 0, "rows": []}
        start |= {"signs": masking.signs(weights, names), "tag": arguments["tag"]}
        jobs[str(out)] = partial(
            prune_chain, start, rewound, missing, out, arguments, data, options
        )
    if jobs:
        run_all(jobs, args.parallel, dense["model"]["width"], data)


def prune_chain(
    start: dict[str, Any],
    rewound: dict[str, Any] | None,
    sparsities: list[float],
    out: Path,
    arguments: dict[str, Any],
    data: Resident | Streamed,
    options: dict[str, Any],
) -> None:
    """Prune and train for all rounds, and write a mask for each sparsity.

    `start` is the dense checkpoint plus the initial mask, signs, round and log rows. Each round
    trains the weights that it prunes or, if given, those of the `rewound` checkpoint.
    """
    total = masking.numel(start["mask"])
    rounds = masking.plan_rounds(total, sparsities, 1 if arguments["one_shot"] else PRUNE_FRACTION)
    model, epochs, rewind = build_model(**start["model"]), arguments["epochs"], arguments["rewind"]
    rates = learning_rates(arguments["schedule"], arguments["lr"], epochs, arguments["warmup"])
    momentum, decay = arguments["momentum"], arguments["weight_decay"]
    optimiser = partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)
    branch_at = min((r.number for r in rounds if r.sparsity), default=inf)
    chain = masking.load_latest_round(out, start | {"precision": options["precision"]}, branch_at)
    stamp, extra = runs.claim(out, arguments, __file__), {"precision": options["precision"]}
    for number, keep, sparsity in [r for r in rounds if r.number > chain["round"]]:
        weights = chain["state_dict"]
        mask = masking.prune_exactly(masking.prune_by_magnitude, weights, chain["mask"], keep)
        model.load_state_dict(masking.apply(rewound["state_dict"] if rewound else weights, mask))
        # Without --rewind the epoch count continues, so that no round repeats a data order.
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
            **options,
        )
        row = {"round": number, "sparsity": masking.sparsity(mask), "kept": keep}
        row |= {"sparsity_total": masking.sparsity_total(mask, model)} | runs.metrics(log[-1])
        row["seconds"] = sum(epoch["seconds"] for epoch in log)
        pruned = chain | stamp | {"state_dict": cpu_state(model), "mask": mask, "round": number}
        pruned["rows"] = [*chain["rows"], row]
        if sparsity:
            checkpoint.save(pruned, paths.imp_file(out, sparsity))
            mask_info = masking.mask_info(pruned, model) | {"imp": arguments | extra} | stamp
            checkpoint.save(mask_info, paths.mask_file(out, sparsity))
        else:
            chain = pruned
            checkpoint.save(chain, paths.round_file(out, number))
    histories = [checkpoint.load(path, ("rows",))["rows"] for path in paths.imp_files(out).values()]
    unique_rows = {row["kept"]: row for rows in (*histories, chain["rows"]) for row in rows}
    rows = [unique_rows[kept] for kept in sorted(unique_rows, reverse=True)]
    if not arguments["keep_rounds"]:
        # A later run to higher sparsities starts from the last round.
        checkpoint.remove([*paths.round_files(out).values()][:-1])
    runs.finish(out, "prune_imp", arguments, rows, data.device, stamp, **extra)


if __name__ == "__main__":
    cli.run(main, torchrun=True)
