"""How well matching finds a permutation that is known: `python -m analyze.planted runs/quick`.

Every dense network below the folder is permuted at random, and noise is added to its weights: each
tensor's own standard deviation times the noise level. Prints the share of channels, in percent,
that each method puts back where they belong (mean ± std over networks); `masked` sees 10% of the
source's weights. Writes planted.csv.
"""

from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from analyze.lib.runs import CELL, dense_runs, parse_root
from common import checkpoint, cli, masking
from common.align.axes import find_axes
from common.align.matching import (
    match_activations,
    match_weights,
    match_weights_best,
    matched_weights,
)
from common.align.permutation import inverse, permute, random_permutation
from common.data import reader
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device

LEVELS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
SPARSITY, RESTARTS = 0.9, 5


def noisy(
    weights: dict[str, Tensor], names: list[str], level: float, seed: int
) -> dict[str, Tensor]:
    """`weights` with normal noise of `level` standard deviations of each tensor in `names`."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name in names:
        value = weights[name]
        if value.numel() > 1:
            noise = torch.randn(value.shape, generator=generator)
            changed[name] = value + level * value.std() * noise
    return weights | changed


def recovered(found: dict[str, Tensor], planted: dict[str, Tensor]) -> float:
    """The share of channels, in percent, that `found` puts back."""
    undone = inverse(planted)
    right = sum(
        int((found[axis] == index).sum()) for axis, index in undone.items() if axis in found
    )
    return 100 * right / sum(len(index) for index in undone.values())


def trial(dense: dict[str, Any], data: Any, level: float, images: int) -> dict[str, float]:
    """The share that every method recovers for one network and noise level."""
    target, source = (build_model(**dense["model"]).to(data.device) for _ in range(2))
    axes, names = find_axes(target, data.input_shape), matched_weights(target)
    planted = random_permutation(axes, dense["seed"])
    state = noisy(permute(dense["state_dict"], axes.dims, planted), names, level, dense["seed"])
    target.load_state_dict(dense["state_dict"])
    source.load_state_dict(state)
    batches = (x for x, _ in data.eval_batches("train", 250, images))
    activation, _ = match_activations(source, target, axes, batches)
    ends = [{name: weights[name] for name in names} for weights in (state, dense["state_dict"])]
    weight = match_weights_best(*ends, axes, RESTARTS)
    mask = masking.dense_mask(state, masking.prunable(source))
    keep = masking.keep_count(masking.size(mask), SPARSITY)
    mask = masking.prune_by_magnitude(state, mask, keep)
    masked, _ = match_weights(masking.apply(ends[0], mask), ends[1], axes, activation)
    found = {"activation": activation, "weight": weight, "masked": masked}
    return {method: recovered(permutation, planted) for method, permutation in found.items()}


def main() -> None:
    parser = parse_root(__doc__)
    add = parser.add_argument
    add("--images", type=cli.positive, default=2000, help="for activation matching (default: 2000)")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    read, rows = reader(args.data_dir, pick_device(args.device), args.workers), []
    folders = dense_runs(args.root)["folder"]
    if folders.empty:
        raise UserError(f"no finished dense run below {args.root}: run train_dense.py first")
    for folder in tqdm(folders, "networks", unit="network", disable=None):
        dense = checkpoint.load_dense(folder)
        data, model = read(dense["dataset"]), dense["model"]
        values = (model["name"], model["width"], dense["dataset"]["name"], dense["seed"])
        for level in LEVELS:
            about = dict(zip([*CELL[:3], "seed", "noise"], (*values, level)))
            shares = trial(dense, data, level, args.images)
            rows += [about | {"method": key, "recovered": share} for key, share in shares.items()]
    table = pd.DataFrame(rows)
    checkpoint.save_text(table.to_csv(index=False), args.root / "planted.csv")
    groups = table.groupby([*CELL[:3], "noise", "method"], sort=False)["recovered"]
    text = groups.mean().map("{:.1f}".format)
    text += groups.std().map(lambda std: "" if pd.isna(std) else f" ± {std:.1f}")
    print(
        "channels put back, in percent, mean ± std over networks, by noise in standard deviations"
    )
    print(text.unstack("method")[["activation", "weight", "masked"]].to_string())
    print(f"wrote {args.root / 'planted.csv'}")


if __name__ == "__main__":
    cli.run(main)
