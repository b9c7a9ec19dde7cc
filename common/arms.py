"""The arms of the experiment: which weights each trains under which mask."""

from pathlib import Path
from typing import Any

from common import masking, paths
from common.errors import UserError

ARMS = ("lth", "naive", "permuted", "shuffled", "random-permutation", "imp-target")


def load_mask(folder: Path, sparsity: float, arm: str, dense: dict[str, Any]) -> dict[str, Any]:
    """Read the mask of a sparsity; raises UserError when it does not fit the network or contradicts
    the arm.
    """
    path = paths.mask_file(folder, sparsity)
    mask = masking.load(path, dense)
    if abs(masking.sparsity(mask["mask"]) - sparsity) > 1 / masking.size(mask["mask"]):
        raise UserError(
            f"{path} prunes {masking.sparsity(mask['mask']):.4%}, not {sparsity:.2%}: it was "
            "changed after stage 2"
        )
    source, target, seed = mask["source_seed"], mask["target_seed"], dense["seed"]
    here = dense["dataset"]["name"]
    mask.setdefault("mask_dataset", mask["dataset"]["name"])
    itself = (source, mask["mask_dataset"]) == (seed, here)
    own, foreign = target is None and itself, target is None and not itself
    onto = (target, mask["dataset"]["name"]) == (seed, here)
    random = mask["method"] == "random"
    fits = {"lth": own, "imp-target": own, "naive": foreign, "shuffled": foreign}
    fits |= {"permuted": onto and not random, "random-permutation": onto and random}
    if not fits[arm]:
        made = f"seed {source}, " + (
            "unpermuted" if target is None else f"permuted onto seed {target} by {mask['method']}"
        )
        raise UserError(
            f"--arm {arm} contradicts the files: {path} is of {made}, and the weights are of seed "
            f"{seed}"
        )
    if own:
        masking.check_source(mask, dense, path)
    if arm == "shuffled":
        mask["mask"] = masking.shuffle(mask["mask"], seed)
    return mask
