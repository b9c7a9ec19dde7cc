"""Stage 3: find the permutation that maps the source onto the target, and permute the masks.

    python align_mask.py --source runs/dense/seed0 --target runs/dense/seed1 \\
        --masks runs/imp/seed0 --method activation --out runs/align/activation/seed0-seed1

Methods: `activation` (the paper's: correlation of activations on training images), `weight` (inner
product of the weights), `masked` (weight matching of the pruned source, one permutation a sparsity,
started from activation matching), and the controls `random` and `identity`. The permuted source
must compute the same function, or the script raises. Writes permutation.pt (for `masked` one a
sparsity) and the permuted masks with their signs. Called again, it permutes what has come since.
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
USED_BY = {"match_images": ("activation", "masked"), "restarts": ("weight",)}


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="dense run whose masks are permuted")
    add("--target", type=Path, required=True, help="dense run onto which the source is permuted")
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
    inputs.check_flags(parser, args, needs_images=args.method in USED_BY["match_images"])
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    files, data = (args.source, args.target, args.masks), (args.data_dir, device, args.workers)
    if args.model_fn:
        shape = (args.dataset, args.image_size, args.input_shape)
        read = inputs.load_external(args.model_fn, *files, *shape, *data)
    else:
        read = inputs.load_runs(*files, args.target_epoch, *data)
    source, target, masks, networks, images = read
    variant = {name: getattr(args, name) for name in inputs.HOW}
    unusual = [variant[key] for key, paper in inputs.HOW.items() if variant[key] != paper]
    digests = {"source": source["sha256"], "target": target["sha256"]}
    header = {"source_seed": source["seed"], "target_seed": target["seed"]}
    header |= {"method": "-".join([args.method, *unusual]), "match_epoch": target["epoch"]}
    unused = [flag for flag, methods in USED_BY.items() if args.method not in methods]
    arguments = cli.experiment_arguments(
        args, "masks", "target_epoch", "batch_size", *variant, *unused
    )
    arguments |= digests | header
    arguments["data_dir"] = args.data_dir if args.dataset == "folder" else None
    finished, missing = runs.is_finished(args.out, arguments), inputs.not_permuted(masks, args.out)
    if finished and not missing:
        return runs.print_finished(args.out, __file__)

    start, stamp = time.perf_counter(), provenance.stamp(__file__)
    for network, entry in zip(networks, (source, target)):
        network.to(device).load_state_dict(entry["state_dict"])
    axes = inputs.free_axes(networks[0], source["model"]["input_shape"])
    states = source["state_dict"], target["state_dict"]
    a, b = ({name: state[name].to(device) for name in axes.weights} for state in states)

    @functools.cache
    def by_activations() -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        batches = inputs.matched_images(images(), args.match_images, args.batch_size)
        bar = tqdm(batches, "matching", unit="batch", disable=None, leave=False)
        return matching.match_activations(*networks, axes, bar, **variant)

    def find(mask: dict[str, Tensor]) -> dict[str, Any]:
        """The permutation for a mask, <π(source), target> before and after, and a row an axis."""
        matched, rows = a, None
        if args.method == "activation":
            permutation, rows = by_activations()
        elif args.method == "weight":
            permutation = matching.match_weights_best(a, b, axes, args.restarts, args.seed)
        elif args.method == "masked":
            of_layers = {name: entry for name, entry in mask.items() if name in a}
            matched, (first, _) = masking.apply(a, of_layers), by_activations()
            permutation, _ = matching.match_weights(matched, b, axes, first, args.seed)
        elif args.method == "random":  # another for every pair
            pair = zlib.crc32(f"{source['seed']} {target['seed']}".encode())
            permutation = random_permutation(axes, derived_seed(args.seed, pair))
        else:
            permutation = identity(axes)
        moved = permute(matched, axes.dims, permutation)
        gain = [matching.objective(weights, b) for weights in (matched, moved)]
        rows = rows or matching.describe(permutation)
        return {"permutation": permutation, "objective": gain, "rows": rows}

    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4, *source["model"]["input_shape"], generator=generator)
    for name, mask in missing.items():
        one_each = args.method == "masked"
        path = paths.permutation_file(args.out, name if one_each else None)
        origin = digests | header | stamp | {"unpermuted": mask["unpermuted"] if one_each else None}
        origin["matching"] = provenance.code_digest(__file__, "common/align")
        found = inputs.reusable(path, origin) or find(mask["mask"])
        permuted = permute(source["state_dict"], axes.dims, found["permutation"])
        difference = check_same_function(networks[0], source["state_dict"], permuted, sample)
        runs.claim(args.out, arguments, __file__)
        if not path.is_file():
            checkpoint.save(found | origin, path)
            table, gain = pd.DataFrame(found["rows"]), found["objective"]
            print(table.to_string(index=False, float_format="{:.3f}".format))
            print("objective <π(source), target>: {:.4g} before, {:.4g} after".format(*gain))
            print(f"same function: outputs differ by {difference:.0e} of the largest")
        changes = {"dataset": target["dataset"], "mask_code": mask.get("code"), "align": arguments}
        changes |= {"tag": cli.joined_tag(mask.get("tag"), args.tag)} | header | stamp
        for part in ("mask", "signs"):
            changes[part] = permute(mask[part], axes.dims, found["permutation"])
        checkpoint.save(mask | changes, args.out / name)
        print(f"wrote {args.out / name}")

    runs.claim(args.out, arguments, __file__)  # where nothing but the record was missing, too
    found = {path.stem: checkpoint.load(path) for path in paths.permutation_files(args.out)}
    rows = [{"permutation": name} | row for name, one in found.items() for row in one["rows"]]
    # Masks that were permuted earlier took their time, too.
    record = args.out / "result.json"
    before = checkpoint.load_json(record)["seconds"] if record.is_file() else 0
    extra = {"objective": {name: one["objective"] for name, one in found.items()}}
    extra["seconds"] = before + time.perf_counter() - start
    runs.finish(args.out, "align_mask", arguments, rows, device, stamp, **extra)


if __name__ == "__main__":
    cli.run(main)
