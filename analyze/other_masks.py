"""Baseline masks that need no IMP: random, by magnitude, or by SNIP.

    python -m analyze.other_masks runs/dense/seed1 --kind snip --rewind 10 --sparsity 0.9 --out M
    python train_sparse.py --arm imp-target --weights runs/dense/seed1 --masks M --rewind 10 ...

Writes a masks folder for stage 4, of the dense network itself, tagged `erk`, `snip@10` and so on.
`erk`: random, with layer densities by Erdős-Rényi-kernel (Evci et al. 2020). `magnitude`: the
largest weights at epoch k, over all layers. `snip`: the largest |weight * gradient| at epoch k, on
training images (Lee et al. 2019). For a random mask with the densities of an IMP mask use stage 4's
`--arm shuffled`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint, cli, masking, paths, provenance
from common.data import Batches, load_data
from common.errors import UserError
from common.models import build_model

SNIP_IMAGES = 2000  # for the gradient


def densities(shapes: dict[str, torch.Size], keep: int) -> dict[str, float]:
    """Return the fraction of weights that each layer keeps, so that `keep` weights remain (ERK).

    It is proportional to the sum of the layer's dimensions over their product, and at most 1.
    """
    score = {name: sum(shape) / shape.numel() for name, shape in shapes.items()}
    full: set[str] = set()
    while True:
        free = keep - sum(shapes[name].numel() for name in full)
        factor = free / sum(score[name] * shapes[name].numel() for name in shapes.keys() - full)
        over = {name for name in shapes.keys() - full if factor * score[name] > 1}
        if not over:
            return {name: 1.0 if name in full else factor * score[name] for name in shapes}
        full |= over


def random_scores(shapes: dict[str, torch.Size], density: dict[str, float], seed: int) -> dict:
    """Return random scores > 0 by which global pruning keeps the fraction `density` of a layer."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, shape in shapes.items():
        rank = torch.randperm(shape.numel(), generator=generator).view(shape)
        scores[name] = density[name] + 1 - rank / shape.numel()
    return scores


def snip(model: nn.Module, names: list[str], batches: Batches) -> dict[str, Tensor]:
    """Return |weight * gradient of the loss| by name, for the loss over all images of `batches`.

    BatchNorm uses batch statistics, because at the initialisation it has no others.
    """
    model.train()
    for images, labels in batches:
        F.cross_entropy(model(images), labels, reduction="sum").backward()
    weights = {name: model.get_parameter(name) for name in names}
    return {name: (weight * weight.grad).detach().abs() for name, weight in weights.items()}


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("dense", type=Path, help="folder of the dense run")
    add("--kind", choices=("erk", "magnitude", "snip"), required=True)
    add("--rewind", type=cli.natural, required=True, metavar="K", help="epoch of the weights")
    add("--sparsity", type=cli.fraction, nargs="+", required=True, metavar="S")
    add("--out", type=Path, required=True, help="folder of the masks")
    cli.add_data(parser)
    args = parser.parse_args()
    for path in (paths.mask_file(args.out, sparsity) for sparsity in args.sparsity):
        if path.exists():
            raise UserError(f"{path} exists already: choose another --out")
    dense, rewound = (checkpoint.load_dense(args.dense, epoch) for epoch in (None, args.rewind))
    model = build_model(**dense["model"])
    model.load_state_dict(rewound["state_dict"])
    names = masking.prunable(model)
    weights = {name: rewound["state_dict"][name] for name in names}
    shapes = {name: weight.shape for name, weight in weights.items()}
    scores, tag = weights, f"{args.kind}@{args.rewind}"
    if args.kind == "snip":
        data = load_data(dense["dataset"], args.data_dir, workers=args.workers)
        scores = snip(model, names, data.eval_batches("train", limit=SNIP_IMAGES))
    total = masking.numel(weights)
    counts = {sparsity: masking.keep_count(total, sparsity) for sparsity in args.sparsity}
    for sparsity, keep in counts.items():
        if args.kind == "erk":
            scores = random_scores(shapes, densities(shapes, keep), dense["seed"])
            tag = "erk"
        mask = masking.prune_by_magnitude(scores, masking.dense_mask(scores, names), keep)
        network = {key: dense[key] for key in ("model", "dataset", "seed")}
        network |= {"mask": mask, "signs": masking.signs(dense["state_dict"], names)}
        network["tag"] = cli.joined_tag(dense.get("tag"), tag)
        entry = masking.mask_info(network, model) | provenance.stamp(__file__)
        checkpoint.save(entry, paths.mask_file(args.out, sparsity))
        print(f"wrote {paths.mask_file(args.out, sparsity)}")


if __name__ == "__main__":
    cli.run(main)
