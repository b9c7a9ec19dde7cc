"""How well matching finds a permutation that is known: `python -m analyze.planted runs/quick`.

Every dense network below the folder is permuted at random, and noise is added to its weights: each tensor's own
standard deviation times the noise level. Prints the share of channels, in percent, that each method puts back where
they belong (mean ± std over networks); `masked` sees 10% of the source's weights. Writes planted.csv.
"""

from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from analyze.results import dense_runs, parse_root
from common import checkpoint, cli, masking
from common.axes import find_axes
from common.data import reader
from common.errors import UserError
from common.matching import match_activations, match_weights, match_weights_best, matched_weights
from common.models import build_model
from common.permutation import inverse, permute, random_permutation
from common.training import pick_device

LEVELS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
SPARSITY, RESTARTS = 0.9, 5


def noisy(weights: dict[str, Tensor], names: list[str], level: float, seed: int) -> dict[str, Tensor]:
    """`weights` with normal noise of `level` standard deviations of each tensor in `names`."""
    generator = torch.Generator().manual_seed(seed)
    return weights | {
        name: weights[name] + level * weights[name].std() * torch.randn(weights[name].shape, generator=generator)
        for name in names
        if weights[name].numel() > 1
    }


def recovered(found: dict[str, Tensor], planted: dict[str, Tensor]) -> float:
    """The share of channels, in percent, that `found` puts back."""
    undone = inverse(planted)
    right = sum(int((found[axis] == index).sum()) for axis, index in undone.items() if axis in found)
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
    mask = masking.prune_by_magnitude(state, mask, masking.keep_count(masking.size(mask), SPARSITY))
    masked, _ = match_weights(masking.apply(ends[0], mask), ends[1], axes, activation)
    found = {"activation": activation, "weight": weight, "masked": masked}
    return {method: recovered(permutation, planted) for method, permutation in found.items()}


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--images", type=cli.positive, default=2000, help="for activation matching (default: 2000)")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    folders = dense_runs(args.root)["folder"]
    if folders.empty:
        raise UserError(f"no finished dense run below {args.root}: run train_dense.py first")
    read, rows = reader(args.data_dir, device, args.workers), []
    for folder in tqdm(folders, "networks", unit="network", disable=None):
        dense = checkpoint.load_dense(folder)
        data = read(dense["dataset"])
        about = {"model": dense["model"]["name"], "width": dense["model"]["width"], "dataset": dense["dataset"]["name"], "seed": dense["seed"]}  # fmt: skip
        for level in LEVELS:
            rows += [
                about | {"noise": level, "method": method, "recovered": share}
                for method, share in trial(dense, data, level, args.images).items()
            ]
    table = pd.DataFrame(rows)
    checkpoint.save_text(table.to_csv(index=False), args.root / "planted.csv")
    shares = table.groupby(["model", "width", "dataset", "noise", "method"], sort=False)["recovered"].agg(
        ["mean", "std", "count"]
    )
    text = shares["mean"].map("{:.1f}".format) + shares["std"].map(" ± {:.1f}".format).where(shares["count"] > 1, "")
    print(f"channels put back, in percent, mean ± std over {len(folders)} networks, by noise in standard deviations")
    print(text.unstack("method")[["activation", "weight", "masked"]].to_string())
    print(f"wrote {args.root / 'planted.csv'}")


if __name__ == "__main__":
    cli.run(main)
