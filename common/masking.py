"""Masks: a dict from parameter name to a bool tensor of the parameter's shape, True where a weight
is kept.

A mask is data with the shape of the weights, so `common.align.permutation.permute` moves it as it
moves weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint
from common.errors import UserError

Mask = dict[str, Tensor]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
SHORTCUTS = {"shortcut", "downsample"}


def layer_weights(model: nn.Module) -> list[str]:
    """Names of the weights of all convolution and linear layers."""
    return [
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LAYERS)
    ]


def prunable(model: nn.Module) -> list[str]:
    """Names of the weights that are pruned: all but the convolutions of residual shortcuts, as in
    the authors' code.
    """
    return [name for name in layer_weights(model) if not SHORTCUTS & set(name.split("."))]


def dense_mask(weights: dict[str, Tensor], names: list[str]) -> Mask:
    """The mask that keeps everything."""
    return {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}


def kept(mask: Mask) -> int:
    """How many weights the mask keeps."""
    return sum(int(entry.sum()) for entry in mask.values())


def size(mask: Mask) -> int:
    """How many weights the mask covers."""
    return sum(entry.numel() for entry in mask.values())


def sparsity(mask: Mask) -> float:
    """Pruned share of the weights that the mask covers, in [0, 1]."""
    return 1 - kept(mask) / size(mask)


def sparsity_total(mask: Mask, model: nn.Module) -> float:
    """Pruned share of all convolution and linear weights of `model`, in [0, 1]."""
    weights = model.state_dict()
    return (size(mask) - kept(mask)) / sum(weights[name].numel() for name in layer_weights(model))


def keep_count(total: int, sparsity: float) -> int:
    """How many of `total` weights stay at a sparsity in [0, 1), to the nearest weight."""
    return round(total * (1 - sparsity))


def keep_counts(mask: Mask, sparsities: list[float]) -> dict[float, int]:
    """How many weights of those that `mask` covers stay at each sparsity.

    Raises UserError when that is all or none.
    """
    total = size(mask)
    counts = {sparsity: keep_count(total, sparsity) for sparsity in sparsities}
    for sparsity, count in counts.items():
        if not 0 < count < total:
            raise UserError(f"--sparsity {sparsity} keeps all or none of the {total} weights")
    return counts


Prune = Callable[[dict[str, Tensor], Mask, int], Mask]


def plan(
    total: int, goals: dict[float, int], share: float
) -> tuple[list[int], dict[int, list[float]]]:
    """The weights that each round of an IMP chain keeps, and the sparsities that branch off it.

    The chain prunes `share` of the remaining weights a round, as far as needed. A sparsity branches
    off the last round that keeps more than its goal; the second value holds them by that round.
    """
    counts = [total]
    while counts[-1] > min(goals.values()):
        counts.append(counts[-1] - max(1, round(share * counts[-1])))
    branches: dict[int, list[float]] = {}
    for sparsity, goal in goals.items():
        last = max(number for number, count in enumerate(counts) if count > goal)
        branches.setdefault(last, []).append(sparsity)
    return counts, branches


def prune_exactly(prune: Prune, weights: dict[str, Tensor], mask: Mask, keep: int) -> Mask:
    """`prune(weights, mask, keep)`: a part of `mask`, in the same shapes, that keeps `keep`
    weights.

    Raises ValueError, naming the function, when it is not that.
    """
    pruned, name = prune(weights, mask, keep), prune.__name__
    shapes = {key: (entry.shape, entry.dtype) for key, entry in mask.items()}
    if {key: (entry.shape, entry.dtype) for key, entry in pruned.items()} != shapes:
        raise ValueError(f"{name} changed the names, shapes or types of the mask's entries")
    if kept(pruned) != keep:
        raise ValueError(
            f"{name} kept {kept(pruned)} weights, not {keep}: it must keep exactly so many"
        )
    if any((entry & ~mask[key]).any() for key, entry in pruned.items()):
        raise ValueError(f"{name} brought back weights that were pruned before")
    return pruned


def prune_by_magnitude(weights: dict[str, Tensor], mask: Mask, keep: int) -> Mask:
    """Keep the `keep` weights of largest magnitude among those that `mask` keeps, over all layers
    at once.

    Equals `torch.nn.utils.prune.global_unstructured` with L1 for the same weights and count (Han et
    al. 2015). Raises ValueError when the mask keeps fewer than `keep`.
    """
    if not 0 <= keep <= kept(mask):
        raise ValueError(f"cannot keep {keep} of {kept(mask)} weights")
    magnitude = torch.cat([weights[name].detach().abs().flatten() for name in mask])
    flat = torch.cat([entry.flatten() for entry in mask.values()])
    magnitude[~flat] = -1  # what is pruned already goes first
    flat[torch.topk(magnitude, flat.numel() - keep, largest=False, sorted=False).indices] = False
    pieces = flat.split([entry.numel() for entry in mask.values()])
    return {name: piece.view(entry.shape) for (name, entry), piece in zip(mask.items(), pieces)}


def apply(weights: dict[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """A copy of `weights` with the masked ones set to zero."""
    return {
        name: value * mask[name].to(value.device) if name in mask else value.clone()
        for name, value in weights.items()
    }


def signs(weights: dict[str, Tensor], names: list[str]) -> Mask:
    """True where a weight is positive."""
    return {name: weights[name] > 0 for name in names}


def entry(network: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What a mask file holds, of a network pruned to `mask` from the dense one of `signs`."""
    made = {
        "source_seed": network["seed"],
        "target_seed": None,
        "method": None,
        "match_epoch": None,
    }
    return made | {
        **{key: network[key] for key in ("mask", "signs", "model", "dataset", "tag")},
        "sparsity": sparsity(network["mask"]),
        "sparsity_total": sparsity_total(network["mask"], model),
        "mask_dataset": network["dataset"]["name"],
    }


def check_fits(mask: Mask, weights: dict[str, Tensor], path: object) -> None:
    """Raise UserError unless every entry of a mask, read from `path`, has the shape of the weights
    of its name.
    """
    for name, entry in mask.items():
        if name not in weights or weights[name].shape != entry.shape or entry.dtype != torch.bool:
            raise UserError(
                f"{path} does not fit the network: {name} is {tuple(entry.shape)} {entry.dtype} "
                "there"
            )


def load(path: Path, dense: dict[str, Any]) -> dict[str, Any]:
    """Read the mask file at `path` for the network of a checkpoint; adds `sha256`, its digest.

    Raises UserError when it is no mask file or is for another network.
    """
    entry = checkpoint.load(path, checkpoint.MASKS)
    if entry["model"] != dense["model"]:
        raise UserError(
            f"{path} is a mask for {entry['model']}, and the network is {dense['model']}"
        )
    for part in ("mask", "signs"):
        check_fits(entry[part], dense["state_dict"], path)
    return entry | {"sha256": checkpoint.digest(path)}


def check_source(entry: dict[str, Any], dense: dict[str, Any], path: Path) -> None:
    """Raise UserError unless the mask at `path` was pruned from these very weights, whose signs it
    keeps.
    """
    if any(
        not torch.equal(positive, dense["state_dict"][name] > 0)
        for name, positive in entry["signs"].items()
    ):
        raise UserError(
            f"{path} was pruned from another network of seed {dense['seed']} than the one given "
            "here"
        )


def load_all(folder: Path, dense: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the masks that stage 2 pruned from the network of a checkpoint, by file name;
    `unpermuted` is each one's digest.

    Raises UserError when there is none, or one is of another network or permuted.
    """
    masks = {}
    for path in sorted(folder.glob("mask_*.pt")):
        entry = load(path, dense)
        if (entry["source_seed"], entry["target_seed"]) != (dense["seed"], None):
            made = f"made from seed {entry['source_seed']}, target {entry['target_seed']}"
            raise UserError(f"{path} is no mask of the source: {made}")
        check_source(entry, dense, path)
        digest = entry.pop("sha256")
        masks[path.name] = entry | {"unpermuted": digest}
    if not masks:
        raise UserError(f"no mask_*.pt in {folder}: run prune_imp.py first")
    return masks


def from_prune(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mask]:
    """Split a state dict as torch.nn.utils.prune leaves it (`weight_orig`, `weight_mask`) into
    weights and mask.

    The weights are those that the network computes with, masked ones zero. Other entries stay as
    they are.
    """
    ends = ("_orig", "_mask")
    pruned = [
        name.removesuffix("_orig")
        for name in state
        if name.endswith("_orig") and f"{name[:-5]}_mask" in state
    ]
    weights = {
        name: value
        for name, value in state.items()
        if not (name.endswith(ends) and name[:-5] in pruned)
    }
    mask = {name: state[f"{name}_mask"].bool() for name in pruned}
    return weights | {name: state[f"{name}_orig"] * entry for name, entry in mask.items()}, mask


def to_prune(weights: dict[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """The state dict of weights and mask for a module that torch.nn.utils.prune has prepared:
    `weight_orig`, `weight_mask`.
    """
    state = {name: value for name, value in weights.items() if name not in mask}
    state |= {f"{name}_orig": weights[name] for name in mask}
    return state | {f"{name}_mask": entry.to(weights[name].dtype) for name, entry in mask.items()}


def with_signs(weights: dict[str, Tensor], positive: Mask) -> dict[str, Tensor]:
    """The magnitudes of `weights` with given signs: plus where `positive` is True (cf. Oh et al.
    2025).
    """
    return {
        name: value.abs() * (2 * positive[name].to(value) - 1) for name, value in weights.items()
    }


def rescale_fan_in(weights: dict[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Scale each output unit's weights by sqrt(fan-in / kept fan-in); a unit with none stays 0
    (Evci et al. 2022).
    """
    scaled = {}
    for name, value in weights.items():
        left = mask[name].flatten(1).sum(1)
        factor = (mask[name][0].numel() / left.clamp_min(1)).sqrt() * (left > 0)
        scaled[name] = value * factor.to(value).view(-1, *[1] * (value.dim() - 1))
    return scaled


def shuffle(mask: Mask, seed: int) -> Mask:
    """The mask with its entries shuffled within each layer: the same sparsity of every layer,
    another choice.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: entry.flatten()[torch.randperm(entry.numel(), generator=generator)].view(entry.shape)
        for name, entry in mask.items()
    }


class Masker:
    """Holds a network at its mask: one fused multiply after each optimiser step, one check after
    each epoch.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        parameters = dict(model.named_parameters())
        self.parameters = [parameters[name] for name in mask]
        # In the dtype and memory layout of the weights, so that the multiply stays a single fused
        # pass.
        self.factors = [
            torch.empty_like(p).copy_(entry) for p, entry in zip(self.parameters, mask.values())
        ]

    @torch.no_grad()
    def apply(self) -> None:
        torch._foreach_mul_(self.parameters, self.factors)

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError if a pruned weight is not zero; a weight that diverged to NaN is no
        leak.
        """
        leaks = sum(
            ((p != 0) & (factor == 0) & ~p.isnan()).sum()
            for p, factor in zip(self.parameters, self.factors)
        )
        if leaks:
            raise RuntimeError(f"{int(leaks)} pruned weights are not zero")
