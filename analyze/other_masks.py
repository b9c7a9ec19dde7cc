"""Masks that need no IMP, as baselines: random ones, by magnitude, and by SNIP.

    python -m analyze.other_masks runs/dense/seed1 --kind snip --rewind 10 --sparsity 0.9 --out M
    python train_sparse.py --arm imp-target --weights runs/dense/seed1 --masks M --rewind 10 ...

Writes a masks folder of the network's own for stage 4, tagged `erk`, `snip@10`, ... `erk`: random,
each layer's density by Erdős-Rényi-kernel (Evci et al. 2020); `magnitude`: the largest weights at
epoch k, over all layers; `snip`: those of the largest |weight * gradient| there, on training images
(Lee et al. 2019). A random mask with the densities of an IMP mask is stage 4's `--arm shuffled`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import checkpoint, cli, masking, paths, provenance
from common.data import Batches, load_data
from common.errors import UserError
from common.models import build_model

IMAGES = 2000  # for SNIP's gradient


def densities(shapes: dict[str, torch.Size], keep: int) -> dict[str, float]:
    """The share of weights that each layer keeps, in proportion to its sum of dimensions over their
    product, as far as that is at most 1, so that `keep` weights stay in all (ERK).
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
    """Random positive numbers whose largest, over all layers, are `density` of each layer."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, shape in shapes.items():
        rank = torch.randperm(shape.numel(), generator=generator).view(shape)
        scores[name] = density[name] + 1 - rank / shape.numel()
    return scores


def snip(model: nn.Module, names: list[str], batches: Batches) -> dict[str, Tensor]:
    """|weight * gradient of the loss|, over all images of `batches`, with BatchNorm by batch, as at
    the initialisation it has no statistics yet.
    """
    model.train()
    for images, labels in batches:
        F.cross_entropy(model(images), labels, reduction="sum").backward()
    weights = {name: model.get_parameter(name) for name in names}
    return {name: (weight * weight.grad).detach().abs() for name, weight in weights.items()}


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("dense", type=Path, help="dense run")
    add("--kind", choices=("erk", "magnitude", "snip"), required=True)
    add("--rewind", type=cli.natural, required=True, metavar="K", help="kept epoch")
    add("--sparsity", type=cli.fraction, nargs="+", required=True, metavar="S")
    add("--out", type=Path, required=True, help="folder of the masks")
    cli.add_data(parser)
    args = parser.parse_args()
    for path in (paths.mask_file(args.out, sparsity) for sparsity in args.sparsity):
        if path.exists():
            raise UserError(f"{path} is there already: choose another --out")
    dense, early = (checkpoint.load_dense(args.dense, epoch) for epoch in (None, args.rewind))
    model = build_model(**dense["model"])
    model.load_state_dict(early["state_dict"])
    names = masking.prunable(model)
    weights = {name: early["state_dict"][name] for name in names}
    shapes = {name: weight.shape for name, weight in weights.items()}
    scores, name = weights, f"{args.kind}@{args.rewind}"
    if args.kind == "snip":
        data = load_data(dense["dataset"], args.data_dir, workers=args.workers)
        scores = snip(model, names, data.eval_batches("train", limit=IMAGES))
    for sparsity in args.sparsity:
        keep = masking.keep_count(masking.numel(weights), sparsity)
        if args.kind == "erk":
            scores = random_scores(shapes, densities(shapes, keep), dense["seed"])
            name = "erk"
        mask = masking.prune_by_magnitude(scores, masking.dense_mask(scores, names), keep)
        network = {key: dense[key] for key in ("model", "dataset", "seed")}
        network |= {"mask": mask, "signs": masking.signs(dense["state_dict"], names)}
        tag = cli.joined_tag(dense.get("tag"), name)
        entry = masking.mask_info(network | {"tag": tag}, model) | provenance.stamp(__file__)
        checkpoint.save(entry, paths.mask_file(args.out, sparsity))
        print(f"wrote {paths.mask_file(args.out, sparsity)}")


if __name__ == "__main__":
    cli.run(main)
