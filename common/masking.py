"""Masks: a dict from parameter name to a bool tensor of its shape, True where a weight is kept.

A mask is data with the shape of the weights: `common.align.permutation.permute` moves both alike.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint, paths
from common.errors import UserError

Mask = dict[str, Tensor]
Prune = Callable[[dict[str, Tensor], Mask, int], Mask]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# What stays dense: a part of a weight's name, or all of it, as conv1.weight.
SHORTCUTS = {"shortcut", "downsample"}


def layer_weights(model: nn.Module) -> list[str]:
    """Names of the weights of all convolution and linear layers."""
    layers = (name for name, module in model.named_modules() if isinstance(module, LAYERS))
    return [f"{name}.weight" for name in layers]


def prunable(model: nn.Module) -> list[str]:
    """Names of the weights that are pruned: all but those of shortcuts, as in the authors' code."""
    names = layer_weights(model)
    return [name for name in names if not SHORTCUTS & {name, *name.split(".")}]


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
    layers = (module for module in model.modules() if isinstance(module, LAYERS))
    return (size(mask) - kept(mask)) / sum(layer.weight.numel() for layer in layers)


def keep_count(total: int, sparsity: float) -> int:
    """How many of `total` weights stay at a sparsity in [0, 1), to the nearest weight."""
    return round(total * (1 - sparsity))


def plan(total: int, goals: list[float], share: float) -> list[tuple[int, int, float | None]]:
    """The rounds of an IMP chain, in order: number, weights that it keeps, the goal if it is one.

    The chain prunes `share` of the remaining weights a round, as far as needed. A goal, a sparsity,
    branches off the last round that keeps more weights: its own round, of the next number, goes
    straight there. Raises UserError for a goal that keeps all or none of the `total` weights.
    """
    counts = {goal: keep_count(total, goal) for goal in goals}
    for goal, count in counts.items():
        if not 0 < count < total:
            raise UserError(f"--sparsity {goal} keeps all or none of the {total} weights")
    rounds, number, left = [], 0, total
    while left > min(counts.values(), default=total):
        number, before = number + 1, left
        left -= max(1, round(share * left))
        rounds += [(number, counts[goal], goal) for goal in goals if left <= counts[goal] < before]
        rounds.append((number, left, None))
    return rounds[:-1]  # no goal needs the last round of the chain


def prune_exactly(prune: Prune, weights: dict[str, Tensor], mask: Mask, keep: int) -> Mask:
    """`prune(weights, mask, keep)`: a part of `mask`, in its shapes, that keeps `keep` weights.

    Raises ValueError, naming the function, when it is not that.
    """
    pruned, name = prune(weights, mask, keep), getattr(prune, "__name__", prune)

    def form(mask: Mask) -> dict[str, tuple]:
        return {key: (entry.shape, entry.dtype) for key, entry in mask.items()}

    if form(pruned) != form(mask):
        raise ValueError(f"{name} changed the names, shapes or types of the mask's entries")
    if kept(pruned) != keep:
        raise ValueError(f"{name} kept {kept(pruned)} weights: it must keep exactly {keep}")
    if any((entry & ~mask[key]).any() for key, entry in pruned.items()):
        raise ValueError(f"{name} brought back weights that were pruned before")
    return pruned


def prune_by_magnitude(weights: dict[str, Tensor], mask: Mask, keep: int) -> Mask:
    """Keep the `keep` largest weights of those that `mask` keeps, over all layers at once.

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
    masked = {name: weights[name] * entry.to(weights[name].device) for name, entry in mask.items()}
    return {name: value.clone() for name, value in weights.items()} | masked


def signs(weights: dict[str, Tensor], names: list[str]) -> Mask:
    """True where a weight is positive."""
    return {name: weights[name] > 0 for name in names}


def with_signs(weights: dict[str, Tensor], positive: Mask) -> dict[str, Tensor]:
    """The weights that `positive` names with their magnitudes, plus where it is True (cf. Oh et al.
    2025).
    """
    sizes = {name: weights[name].abs() for name in positive}
    return {name: torch.where(plus, sizes[name], -sizes[name]) for name, plus in positive.items()}


def rescale_fan_in(weights: dict[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """The masked weights, those of each output unit scaled by sqrt(fan-in / kept fan-in) (Evci et
    al. 2022).
    """
    scaled = {}
    for name, kept in mask.items():
        factor = (kept[0].numel() / kept.flatten(1).sum(1).clamp_min(1)).sqrt()
        scaled[name] = weights[name] * factor.view(-1, *[1] * (kept.dim() - 1))
    return scaled


def shuffle(mask: Mask, seed: int) -> Mask:
    """The mask with its entries shuffled within each layer, whose sparsities stay."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: entry.flatten()[torch.randperm(entry.numel(), generator=generator)].view(entry.shape)
        for name, entry in mask.items()
    }


class Masker:
    """Holds a network at its mask: a fused multiply after each step, a check after each epoch.

    An empty mask, as of a dense network, holds nothing.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        self.parameters = [model.get_parameter(name) for name in mask]
        # In the dtype and memory layout of the weights, for a fused multiply in a single pass.
        self.factors = [
            torch.empty_like(p).copy_(entry) for p, entry in zip(self.parameters, mask.values())
        ]

    @torch.no_grad()
    def apply(self) -> None:
        if self.parameters:
            torch._foreach_mul_(self.parameters, self.factors)

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError if a pruned weight is not zero; NaN, of divergence, is no leak."""
        pairs = zip(self.parameters, self.factors)
        leaks = sum(((p != 0) & (factor == 0) & ~p.isnan()).sum() for p, factor in pairs)
        if leaks:
            raise RuntimeError(f"{int(leaks)} pruned weights are not zero")


# ---------------------------------------------------------------- files


def entry(network: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What a mask file holds, of a network pruned to `mask` from the dense one of `signs`."""
    return {key: network[key] for key in ("mask", "signs", "model", "dataset", "tag")} | {
        "sparsity": sparsity(network["mask"]),
        "sparsity_total": sparsity_total(network["mask"], model),
        "mask_dataset": (network["dataset"] or {}).get("name"),
        "source_seed": network["seed"],
        "target_seed": None,
        "method": None,
        "match_epoch": None,
    }


def check_fits(mask: Mask, weights: dict[str, Tensor], path: object) -> None:
    """Raise UserError unless a mask, read from `path`, has the shapes of the weights."""
    for name, entry in mask.items():
        if name not in weights or weights[name].shape != entry.shape or entry.dtype != torch.bool:
            found = f"{name} is {tuple(entry.shape)} {entry.dtype} there"
            raise UserError(f"{path} does not fit the network: {found}")


def check_parts(entry: dict[str, Any], dense: dict[str, Any], path: Path) -> None:
    """Raise UserError unless mask and signs, read from `path`, fit a network and each other."""
    if entry["model"] != dense["model"]:
        raise UserError(f"{path} is for {entry['model']}, and the network is {dense['model']}")
    for part in ("mask", "signs"):
        check_fits(entry[part], dense["state_dict"], path)
    if entry["mask"].keys() != entry["signs"].keys():
        raise UserError(f"{path} does not fit the network: its mask and signs are of other layers")


def load(path: Path, dense: dict[str, Any]) -> dict[str, Any]:
    """Read the mask file at `path` for the network of a checkpoint; adds `sha256`, its digest.

    Raises UserError when it is no mask file or is for another network.
    """
    entry = checkpoint.load(path, checkpoint.MASKS)
    check_parts(entry, dense, path)
    return entry | {"sha256": checkpoint.digest(path)}


def check_source(entry: dict[str, Any], dense: dict[str, Any], path: Path) -> None:
    """Raise UserError unless the mask at `path` has the signs of these very weights."""
    weights = dense["state_dict"]
    if any((positive != (weights[name] > 0)).any() for name, positive in entry["signs"].items()):
        seed = dense["seed"]
        raise UserError(f"{path} was pruned from another network of seed {seed} than is given here")


def load_all(folder: Path, dense: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the masks that stage 2 pruned from the network of a checkpoint, by file name.

    `unpermuted` is each one's digest. Raises UserError when there is none, or one is of another
    network or permuted.
    """
    masks = {}
    for path in paths.mask_files(folder):
        entry = load(path, dense)
        if (entry["source_seed"], entry["target_seed"]) != (dense["seed"], None):
            of = f"of seed {entry['source_seed']}, target {entry['target_seed']}"
            raise UserError(
                f"{path} is {of}, and --source is seed {dense['seed']}: give the masks that "
                "prune_imp.py made of the source"
            )
        check_source(entry, dense, path)
        masks[path.name] = entry | {"unpermuted": entry.pop("sha256")}
    if not masks:
        there = checkpoint.siblings(folder / "mask_*.pt")
        raise UserError(f"no mask_*.pt in {folder}{there}: give the folder that prune_imp.py wrote")
    return masks


def latest(folder: Path, start: dict[str, Any], before: int) -> dict[str, Any]:
    """The network of the last round below `before` in `folder`; `start`, where there is none.

    Raises UserError when its file is of another chain or round.
    """
    earlier = [path for number, path in paths.round_files(folder).items() if number < before]
    if not earlier:
        return start
    path = earlier[-1]
    network = checkpoint.load(path, (*checkpoint.WEIGHTS, "round", "rows", "mask", "signs"))
    check_parts(network, start, path)
    check_source(network, start, path)
    if path != paths.round_file(folder, network["round"]):
        raise UserError(f"{path} holds round {network['round']}: remove it")
    return network


def from_prune(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mask]:
    """The weights and the mask of a state dict as torch.nn.utils.prune leaves it.

    `weight_orig` and `weight_mask` become `weight`, masked ones zero; other entries stay.
    """
    weights, mask = dict(state), {}
    for name in [key.removesuffix("_mask") for key in state if key.endswith("_mask")]:
        if f"{name}_orig" in state and state[f"{name}_orig"].shape == state[f"{name}_mask"].shape:
            mask[name] = weights.pop(f"{name}_mask").bool()
            weights[name] = weights.pop(f"{name}_orig") * mask[name]
    return weights, mask
