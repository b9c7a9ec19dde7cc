"""The arms of the experiment: which weights are trained under which mask."""

from pathlib import Path
from typing import Any

from common import masking, paths
from common.errors import UserError

ARMS = ("lth", "naive", "permuted", "shuffled", "random-permutation", "imp-target")


def load_mask(folder: Path, sparsity: float, arm: str, dense: dict[str, Any]) -> dict[str, Any]:
    """Read the mask file of a sparsity, to train a checkpoint of a dense run under it.

    Raises UserError when the mask does not fit the network or contradicts the arm.
    """
    path = paths.mask_file(folder, sparsity)
    mask_info = masking.load(path, dense)
    actual = masking.sparsity(mask_info["mask"])
    if abs(actual - sparsity) > 1 / masking.numel(mask_info["mask"]):
        raise UserError(f"{path} prunes {actual:.4%}: it was changed after stage 2")
    source, target, method = (mask_info[key] for key in ("source_seed", "target_seed", "method"))
    seed, dataset = dense["seed"], dense["dataset"]["name"]
    mask_info.setdefault("mask_dataset", mask_info["dataset"]["name"])
    if target is not None:
        arms = ("random-permutation",) if method == "random" else ("permuted",)
        if (target, mask_info["dataset"]["name"]) != (seed, dataset):
            arms = ()
    elif (source, mask_info["mask_dataset"]) == (seed, dataset):
        arms = ("lth", "imp-target")
        masking.check_source(mask_info, dense, path)
    else:
        arms = ("naive", "shuffled")
    if arm not in arms:
        history = "unpermuted" if target is None else f"permuted onto seed {target} by {method}"
        usage = f"is for --arm {' or '.join(arms)}" if arms else "fits no arm"
        raise UserError(
            f"--arm {arm} contradicts the files: {path} is from seed {source}, {history}, and the "
            f"weights are from seed {seed}; this combination {usage}"
        )
    if target is not None and isinstance(align := mask_info.get("align"), dict):
        if dense["kept"].get(str(mask_info["match_epoch"])) != align.get("target"):
            raise UserError(
                f"{path} was permuted onto another network of seed {seed} than --weights"
            )
    if arm == "shuffled":
        mask_info["mask"] = masking.shuffle(mask_info["mask"], seed)
    return mask_info
