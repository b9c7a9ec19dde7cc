"""Masks: dicts from parameter name to a bool tensor of its shape, True where a weight is kept.

Masks have the names and shapes of weights, so `common.align.permutation.permute` permutes both.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import checkpoint, paths
from common.errors import UserError

Mask = dict[str, Tensor]
Prune = Callable[[dict[str, Tensor], Mask, int], Mask]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# Weights that stay dense: a part of the name, or the whole name, as conv1.weight.
SHORTCUTS = {"shortcut", "downsample"}


def layer_weights(model: nn.Module) -> list[str]:
    """Names of the weights of all convolution and linear layers."""
    layers = (name for name, module in model.named_modules() if isinstance(module, LAYERS))
    return [f"{name}.weight" for name in layers]


def prunable(model: nn.Module) -> list[str]:
    """Names of the weights to prune: all layers but shortcuts, as in the authors' code.

    Raises UserError for a layer whose weight is computed, as by weight_norm, or has two names.
    """
    names = [name for name in layer_weights(model) if not SHORTCUTS & {name, *name.split(".")}]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if [id(p) for p in parameters.values()].count(id(parameters.get(name))) != 1:
            raise UserError(f"{name} cannot be pruned: it is not a parameter with a single name")
    return names


def dense_mask(weights: dict[str, Tensor], names: list[str]) -> Mask:
    """Return a mask that keeps all weights of `names`."""
    return {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}


def num_kept(mask: Mask) -> int:
    """Number of weights that the mask keeps."""
    return sum(int(layer_mask.sum()) for layer_mask in mask.values())


def numel(mask: Mask) -> int:
    """Number of weights that the mask covers."""
    return sum(layer_mask.numel() for layer_mask in mask.values())


def sparsity(mask: Mask) -> float:
    """Pruned share of the weights that the mask covers, in [0, 1]."""
    return 1 - num_kept(mask) / numel(mask)


def sparsity_total(mask: Mask, model: nn.Module) -> float:
    """Pruned share of all convolution and linear weights of `model`, and others in the mask."""
    layers = [item for item in model.named_modules() if isinstance(item[1], LAYERS)]
    sizes = {f"{name}.weight": layer.weight.numel() for name, layer in layers}
    sizes |= {name: layer_mask.numel() for name, layer_mask in mask.items()}
    return (numel(mask) - num_kept(mask)) / sum(sizes.values())


def keep_count(total: int, sparsity: float) -> int:
    """Number of weights out of `total` to keep at a sparsity in [0, 1), rounded.

    Raises UserError for all or none.
    """
    count = round(total * (1 - sparsity))
    if not 0 < count < total:
        raise UserError(f"--sparsity {sparsity} keeps all or none of the {total} weights")
    return count


class Round(NamedTuple):
    """A pruning round of IMP: keep `keep` weights; `sparsity` is None for rounds of the chain."""

    number: int
    keep: int
    sparsity: float | None


def plan_rounds(total: int, sparsities: list[float], fraction: float) -> list[Round]:
    """Plan an IMP chain and its branches, in order of execution.

    Each round of the chain prunes `fraction` of the remaining weights. A sparsity branches off the
    last of these rounds that keeps more weights: one round, with the next number, prunes to its
    exact count. Raises UserError for a sparsity that keeps all or none of the `total` weights.
    """
    counts = {sparsity: keep_count(total, sparsity) for sparsity in sparsities}
    rounds, number, remaining = [], 0, total
    while remaining > min(counts.values(), default=total):
        number, previous = number + 1, remaining
        remaining -= max(1, round(fraction * remaining))
        branches = [s for s in sparsities if remaining <= counts[s] < previous]
        rounds += [Round(number, counts[s], s) for s in branches]
        rounds.append(Round(number, remaining, None))
    return rounds[:-1]  # nothing branches off the last round


def prune_exactly(prune: Prune, weights: dict[str, Tensor], mask: Mask, keep: int) -> Mask:
    """Return `prune(weights, mask, keep)` after checking it.

    Raises ValueError, naming the function, unless its result has the names, shapes and types of
    `mask`, keeps exactly `keep` weights, and none that `mask` has pruned.
    """
    pruned, name = prune(weights, mask, keep), getattr(prune, "__name__", prune)

    def signature(mask: Mask) -> dict[str, tuple]:
        return {key: (layer_mask.shape, layer_mask.dtype) for key, layer_mask in mask.items()}

    if signature(pruned) != signature(mask):
        raise ValueError(f"{name} changed the names, shapes or types of the mask's entries")
    if num_kept(pruned) != keep:
        raise ValueError(f"{name} kept {num_kept(pruned)} weights: it must keep exactly {keep}")
    if any((layer_mask & ~mask[key]).any() for key, layer_mask in pruned.items()):
        raise ValueError(f"{name} brought back weights that were pruned before")
    return pruned


def prune_by_magnitude(weights: dict[str, Tensor], mask: Mask, keep: int) -> Mask:
    """Keep the `keep` largest of the weights that `mask` keeps, across all layers.

    Equals `torch.nn.utils.prune.global_unstructured` with L1 for the same weights and count (Han et
    al. 2015). Raises ValueError when the mask keeps fewer than `keep`.
    """
    if not 0 <= keep <= num_kept(mask):
        raise ValueError(f"cannot keep {keep} of {num_kept(mask)} weights")
    magnitude = torch.cat([weights[name].detach().abs().flatten() for name in mask])
    flat = torch.cat([layer_mask.flatten() for layer_mask in mask.values()])
    magnitude[~flat] = -1  # pruned weights come first
    flat[torch.topk(magnitude, flat.numel() - keep, largest=False, sorted=False).indices] = False
    parts = flat.split([layer_mask.numel() for layer_mask in mask.values()])
    return {name: part.view(mask[name].shape) for name, part in zip(mask, parts)}


def apply(weights: dict[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Return a copy of `weights` with the pruned ones set to zero."""
    masked = {name: weights[name] * kept.to(weights[name].device) for name, kept in mask.items()}
    return {name: weight.clone() for name, weight in weights.items()} | masked


def signs(weights: dict[str, Tensor], names: list[str]) -> Mask:
    """True where a weight is positive."""
    return {name: weights[name] > 0 for name in names}


def with_signs(weights: dict[str, Tensor], positive: Mask) -> dict[str, Tensor]:
    """Give the weights named in `positive` its signs, True for + (cf. Oh et al. 2025)."""
    sizes = {name: weights[name].abs() for name in positive}
    return {name: torch.where(plus, sizes[name], -sizes[name]) for name, plus in positive.items()}


def rescale_fan_in(weights: dict[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """Scale the masked weights of each output unit by sqrt(fan-in / kept fan-in).

    From Evci et al. (2022). A unit without kept weights stays 0.
    """
    scaled = {}
    for name, kept in mask.items():
        factor = (kept[0].numel() / kept.flatten(1).sum(1).clamp_min(1)).sqrt()
        scaled[name] = weights[name] * factor.view(-1, *[1] * (kept.dim() - 1))
    return scaled


def shuffle(mask: Mask, seed: int) -> Mask:
    """Shuffle the mask within each layer, which keeps every layer's sparsity."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: kept.flatten()[torch.randperm(kept.numel(), generator=generator)].view(kept.shape)
        for name, kept in mask.items()
    }


class Masker:
    """Keeps the pruned weights of a network in training at zero; an empty mask does nothing.

    `apply` after every optimiser step is one fused multiplication; `check` verifies an epoch.
    """

    def __init__(self, model: nn.Module, mask: Mask):
        self.parameters = [model.get_parameter(name) for name in mask]
        # _foreach_mul_ is fused only for factors of the weights' dtype and memory layout.
        self.factors = [
            torch.empty_like(weight).copy_(kept)
            for weight, kept in zip(self.parameters, mask.values())
        ]

    @torch.no_grad()
    def apply(self) -> None:
        if self.parameters:
            torch._foreach_mul_(self.parameters, self.factors)

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError if a pruned weight is neither zero nor NaN (as after divergence)."""
        pairs = zip(self.parameters, self.factors)
        leaks = sum(
            ((weight != 0) & (factor == 0) & ~weight.isnan()).sum() for weight, factor in pairs
        )
        if leaks:
            raise RuntimeError(f"{int(leaks)} pruned weights are not zero")


# ---------------------------------------------------------------- files


def mask_info(pruned: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the content of a mask file (docs/files.md) for `pruned`, a checkpoint of `model`."""
    return {key: pruned[key] for key in ("mask", "signs", "model", "dataset", "tag")} | {
        "sparsity": sparsity(pruned["mask"]),
        "sparsity_total": sparsity_total(pruned["mask"], model),
        "mask_dataset": (pruned["dataset"] or {}).get("name"),
        "source_seed": pruned["seed"],
        "target_seed": None,
        "method": None,
        "match_epoch": None,
    }


def check_fits(mask: Mask, weights: dict[str, Tensor], path: object) -> None:
    """Raise UserError unless the mask read from `path` has the names and shapes of the weights."""
    for name, kept in mask.items():
        if name not in weights or weights[name].shape != kept.shape or kept.dtype != torch.bool:
            details = f"{name} is {tuple(kept.shape)} {kept.dtype} there"
            raise UserError(f"{path} does not fit the network: {details}")


def check_info(info: dict[str, Any], dense: dict[str, Any], path: Path) -> None:
    """Raise UserError unless mask and signs, read from `path`, fit a checkpoint and each other."""
    if info["model"] != dense["model"]:
        raise UserError(f"{path} is for {info['model']}, but the network is {dense['model']}")
    for key in ("mask", "signs"):
        check_fits(info[key], dense["state_dict"], path)
    if info["mask"].keys() != info["signs"].keys():
        raise UserError(f"{path} does not fit the network: mask and signs cover different layers")


def load(path: Path, dense: dict[str, Any]) -> dict[str, Any]:
    """Read the mask file at `path` for the network of a checkpoint; adds its digest as `sha256`.

    Raises UserError when it is not a mask file or does not fit the network.
    """
    info = checkpoint.load(path, checkpoint.MASKS)
    check_info(info, dense, path)
    return info | {"sha256": checkpoint.digest(path)}


def check_source(info: dict[str, Any], dense: dict[str, Any], path: Path) -> None:
    """Raise UserError unless the signs read from `path` are those of the weights in `dense`."""
    weights = dense["state_dict"]
    if any((positive != (weights[name] > 0)).any() for name, positive in info["signs"].items()):
        seed = dense["seed"]
        raise UserError(f"{path} was pruned from another network of seed {seed} than the one given")


def load_all(folder: Path, dense: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the masks that stage 2 pruned from the network of a checkpoint, by file name.

    Adds each file's digest as `unpermuted`. Raises UserError when the folder has no mask, or one
    that is permuted or was pruned from another network.
    """
    masks = {}
    for path in paths.mask_files(folder):
        info = load(path, dense)
        if (info["source_seed"], info["target_seed"]) != (dense["seed"], None):
            seeds = f"of seed {info['source_seed']}, target {info['target_seed']}"
            raise UserError(
                f"{path} is {seeds}, but --source is seed {dense['seed']}: pass the masks that "
                "prune_imp.py made from the source"
            )
        check_source(info, dense, path)
        masks[path.name] = info | {"unpermuted": info.pop("sha256")}
    if not masks:
        files = checkpoint.alternatives(folder / "mask_*.pt")
        raise UserError(f"no mask_*.pt in {folder}{files}: pass the folder that prune_imp.py wrote")
    return masks


def load_latest_round(folder: Path, start: dict[str, Any], before: int) -> dict[str, Any]:
    """Read the network of the last round below `before` in `folder`; return `start` if none.

    Raises UserError when the file is from another chain or round, or of another precision.
    """
    earlier = [path for number, path in paths.round_files(folder).items() if number < before]
    if not earlier:
        return start
    path = earlier[-1]
    chain = checkpoint.load(path, (*checkpoint.WEIGHTS, "round", "rows", "mask", "signs"))
    chain = {"precision": start["precision"]} | chain  # earlier versions did not record it
    check_info(chain, start, path)
    check_source(chain, start, path)
    if path != paths.round_file(folder, chain["round"]):
        raise UserError(f"{path} holds round {chain['round']}: remove it")
    if chain["precision"] != start["precision"]:
        raise UserError(
            f"{path} was trained in {chain['precision']} and not {start['precision']}: go back to "
            "that with --precision, or choose another --out"
        )
    return chain


def from_prune(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Mask]:
    """Return weights and mask of a state dict that torch.nn.utils.prune has modified.

    `weight_orig` times `weight_mask` becomes `weight`; other entries stay.
    """
    weights, mask = dict(state), {}
    for name in [key.removesuffix("_mask") for key in state if key.endswith("_mask")]:
        if f"{name}_orig" in state and state[f"{name}_orig"].shape == state[f"{name}_mask"].shape:
            mask[name] = weights.pop(f"{name}_mask").bool()
            weights[name] = weights.pop(f"{name}_orig") * mask[name]
    return weights, mask
