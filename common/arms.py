"""The arms of the experiment: which weights each trains under which mask."""

from pathlib import Path
from typing import Any

from common import masking, paths
from common.errors import UserError

ARMS = ("lth", "naive", "permuted", "shuffled", "random-permutation", "imp-target")


def load_mask(folder: Path, sparsity: float, arm: str, dense: dict[str, Any]) -> dict[str, Any]:
    """Read the mask of a sparsity for the weights of a checkpoint of a dense run.

    Raises UserError when it does not fit the network or contradicts the arm.
    """
    path = paths.mask_file(folder, sparsity)
    mask = masking.load(path, dense)
    found = masking.sparsity(mask["mask"])
    if abs(found - sparsity) > 1 / masking.size(mask["mask"]):
        raise UserError(f"{path} prunes {found:.4%}: it was changed after stage 2")
    source, target, seed = mask["source_seed"], mask["target_seed"], dense["seed"]
    dataset = dense["dataset"]["name"]
    mask.setdefault("mask_dataset", mask["dataset"]["name"])
    if target is not None:
        random = mask["method"] == "random"
        arms = ("random-permutation",) if random else ("permuted",)
        if (target, mask["dataset"]["name"]) != (seed, dataset):
            arms = ()
    elif (source, mask["mask_dataset"]) == (seed, dataset):
        arms = ("lth", "imp-target")
        masking.check_source(mask, dense, path)
    else:
        arms = ("naive", "shuffled")
    if arm not in arms:
        made = "unpermuted"
        if target is not None:
            made = f"permuted onto seed {target} by {mask['method']}"
        trained = f"is for --arm {' or '.join(arms)}" if arms else "no arm trains"
        raise UserError(
            f"--arm {arm} contradicts the files: {path} is of seed {source}, {made}, and the "
            f"weights are of seed {seed}, which {trained}"
        )
    if target is not None and isinstance(align := mask.get("align"), dict):
        if dense["kept"].get(str(mask["match_epoch"])) != align.get("target"):
            raise UserError(
                f"{path} was permuted onto another network of seed {seed} than --weights"
            )
    if arm == "shuffled":
        mask["mask"] = masking.shuffle(mask["mask"], seed)
    return mask
