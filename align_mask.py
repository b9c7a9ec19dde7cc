"""Stage 3: find the permutation that maps the source onto the target, and permute the masks.

    python align_mask.py --source runs/dense/seed0 --target runs/dense/seed1 \\
        --masks runs/imp/seed0 --method activation --out runs/align/activation/seed0-seed1

Methods: `activation` (the paper's: correlation of activations on training images), `weight` (inner
product of the weights), `masked` (weight matching of the pruned source, a permutation per sparsity,
started from activation matching), and the controls `random` and `identity`. The script raises when
the permuted source does not compute the same function. Writes permutation.pt (for `masked` one per
sparsity) and the permuted masks with their signs. Run again, it permutes new masks.
"""

import argparse
import functools
import time
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, cli, masking, paths, provenance, runs
from common.align import inputs, matching
from common.align.permutation import check_same_function, identity, permute, random_permutation
from common.data import derived_seed
from common.runtime.device import pick_device

METHODS = ("activation", "weight", "masked", "random", "identity")
USED_BY = dict.fromkeys(("match_images", *inputs.OPTIONS), ("activation", "masked"))
USED_BY["restarts"] = ("weight",)


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="dense run whose masks are permuted")
    add("--target", type=Path, required=True, help="dense run that the source is matched to")
    add("--masks", type=Path, help="masks folder of the source, from prune_imp.py")
    add("--method", choices=METHODS, default="activation", help="default: %(default)s")
    add("--target-epoch", type=cli.natural, metavar="K", help="of the target (default: its last)")
    add("--restarts", type=cli.positive, default=5, help="of weight matching (default: 5)")
    add("--seed", type=cli.natural, default=0, help="of random choices (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder for the permutation and permuted masks")
    inputs.add_matching(parser)
    inputs.add_external(parser)
    cli.add_tag(parser)
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    inputs.check_flags(parser, args, USED_BY)
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    files, data = (args.source, args.target, args.masks), (args.data_dir, device, args.workers)
    if args.model_fn:
        shape = (args.dataset, args.image_size, args.input_shape)
        loaded = inputs.load_external(args.model_fn, *files, *shape, *data)
    else:
        loaded = inputs.load_runs(*files, args.target_epoch, *data)
    source, target, masks, networks, load_images = loaded
    options = {name: getattr(args, name) for name in inputs.OPTIONS}
    changed = [value for name, value in options.items() if value != inputs.OPTIONS[name]]
    digests = {"source": source["sha256"], "target": target["sha256"]}
    header = {"source_seed": source["seed"], "target_seed": target["seed"]}
    header |= {"method": "-".join([args.method, *changed]), "match_epoch": target["epoch"]}
    unused = [flag for flag, methods in USED_BY.items() if args.method not in methods]
    excluded = ("masks", "target_epoch", "batch_size", *options, *unused)
    arguments = cli.experiment_arguments(args, *excluded) | digests | header
    arguments["data_dir"] = args.data_dir if args.dataset == "folder" else None
    finished, missing = runs.is_finished(args.out, arguments), inputs.unpermuted(masks, args.out)
    if finished and not missing:
        return runs.print_finished(args.out, __file__)

    start, stamp = time.perf_counter(), provenance.stamp(__file__)
    for network, entry in zip(networks, (source, target)):
        network.to(device).load_state_dict(entry["state_dict"])
    axes = inputs.free_axes(networks[0], source["model"]["input_shape"])
    w_a, w_b = ({name: network.state_dict()[name] for name in axes.weights} for network in networks)

    @functools.cache
    def match_activations() -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        batches = inputs.matched_images(load_images(), args.match_images, args.batch_size)
        bar = tqdm(batches, "matching", unit="batch", disable=None, leave=False)
        return matching.match_activations(*networks, axes, bar, **options)

    def match(mask: dict[str, Tensor]) -> dict[str, Any]:
        """The permutation for a mask, <π(source), target> before and after, and a row per axis."""
        weights, rows = w_a, None
        if args.method == "activation":
            permutation, rows = match_activations()
        elif args.method == "weight":
            permutation = matching.match_weights_best(w_a, w_b, axes, args.restarts, args.seed)
        elif args.method == "masked":
            mask = {name: entry for name, entry in mask.items() if name in w_a}
            weights, (initial, _) = masking.apply(w_a, mask), match_activations()
            permutation, _ = matching.match_weights(weights, w_b, axes, initial, args.seed)
        elif args.method == "random":  # a different one for every pair
            pair = zlib.crc32(f"{source['seed']} {target['seed']}".encode())
            permutation = random_permutation(axes, derived_seed(args.seed, pair))
        else:
            permutation = identity(axes)
        permuted = permute(weights, axes.dims, permutation)
        objectives = [matching.objective(state, w_b) for state in (weights, permuted)]
        rows = rows or matching.describe(permutation)
        return {"permutation": permutation, "objective": objectives, "rows": rows}

    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4, *source["model"]["input_shape"], generator=generator)
    for name, mask in missing.items():
        uses_mask = args.method == "masked"
        path = paths.permutation_file(args.out, name if uses_mask else None)
        origin = digests | header | stamp
        origin["unpermuted"] = mask["unpermuted"] if uses_mask else None
        origin["matching"] = provenance.code_digest(__file__, "common/align")
        result = inputs.load_permutation(path, origin) or match(mask["mask"])
        permuted = permute(source["state_dict"], axes.dims, result["permutation"])
        inputs.check_fixed_buffers(networks, permuted)
        difference = check_same_function(networks[0], source["state_dict"], permuted, sample)
        runs.claim(args.out, arguments, __file__)
        if not path.is_file():
            checkpoint.save(result | origin, path)
            table, (before, after) = pd.DataFrame(result["rows"]), result["objective"]
            print(table.to_string(index=False, float_format="{:.3f}".format))
            print(f"objective <π(source), target>: {before:.4g} before, {after:.4g} after")
            print(f"same function: outputs differ by {difference:.0e} of the largest")
        changes = {"dataset": target["dataset"], "mask_code": mask.get("code"), "align": arguments}
        changes |= {"tag": cli.joined_tag(mask.get("tag"), args.tag)} | header | stamp
        for part in ("mask", "signs"):
            changes[part] = permute(mask[part], axes.dims, result["permutation"])
        checkpoint.save(mask | changes, args.out / name)
        print(f"wrote {args.out / name}")
    runs.claim(args.out, arguments, __file__)  # also when only result.json was missing
    saved = {path.stem: checkpoint.load(path) for path in paths.permutation_files(args.out)}
    rows = [{"permutation": name} | row for name, entry in saved.items() for row in entry["rows"]]
    record = args.out / "result.json"
    earlier = checkpoint.load_json(record)["seconds"] if record.is_file() else 0
    extra = {"objective": {name: entry["objective"] for name, entry in saved.items()}}
    extra["seconds"] = earlier + time.perf_counter() - start
    tag = cli.joined_tag(*(mask.get("tag") for mask in masks.values()), args.tag)
    runs.finish(args.out, "align_mask", arguments | {"tag": tag}, rows, device, stamp, **extra)


if __name__ == "__main__":
    cli.run(main)
