"""How much masks have in common: `python -m analyze.masks runs/quick`.

For every pair of networks whose target was pruned too (its masks folder beside the source's): the share of the
weights that IMP keeps in B and that the mask of A keeps as well, before and after it is permuted by each method,
with what chance gives for masks of the same sparsity in every layer. Also each mask's sparsity by layer, and the
units that it leaves without inputs or without outputs. Writes masks.csv, a row a mask and layer, and units.csv.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analyze.results import find_results, parse_root, readable
from common import checkpoint, cli, masking
from common.axes import find_axes
from common.errors import UserError
from common.masking import Mask
from common.models import build_model
from common.permutation import channel_rows, find_places

NETWORK = ["model", "width", "dataset"]
PAIR = [*NETWORK, "mask_dataset", "sparsity", "source_seed", "target_seed"]
MASK = [*PAIR, "method", "match_epoch"]


def overlap(mask: Mask, reference: Mask) -> list[dict[str, Any]]:
    """A row a layer: weights, how many each keeps, both keep, and both would keep by chance (hypergeometric mean)."""
    rows = []
    for name, entry in mask.items():
        other = reference[name]
        kept, wanted = int(entry.sum()), int(other.sum())
        shared, chance = int((entry & other).sum()), kept * wanted / entry.numel()
        rows.append({"layer": name, "weights": entry.numel(), "kept": kept, "kept_reference": wanted, "shared": shared, "chance": chance})  # fmt: skip
    return rows


def idle_units(mask: Mask, model: torch.nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """How many hidden units there are, and how many have no kept weight left into them, or out of them.

    Weights that are never pruned count as kept.
    """
    axes, state = find_axes(model, input_shape), model.state_dict()
    weights: dict[str, Tensor] = {
        name: mask.get(name, torch.ones_like(state[name], dtype=torch.bool)) for name in masking.layer_weights(model)
    }
    counts = {"units": sum(axes.sizes.values()), "without_inputs": 0, "without_outputs": 0}
    for axis, places in find_places(weights, axes).items():
        for column, side in (
            ("without_inputs", [place for place in places if place.dim == 0]),
            ("without_outputs", [place for place in places if place.dim == 1]),
        ):
            rows = [channel_rows(weights[place.tensor], place, axes.sizes[axis]) for place in side]
            if rows:
                counts[column] += int((~torch.cat(rows, 1).any(1)).sum())
    return counts


def load_all(root: Path) -> dict[tuple, dict[str, Any]]:
    """All masks below `root`, by the columns MASK; target, method and match epoch are None as pruned."""
    found: dict[tuple, dict[str, Any]] = {}
    for stage in ("prune_imp", "align_mask"):
        for result in find_results(root, stage):
            for path in sorted(result["folder"].glob("mask_*.pt")):
                if (entry := readable(checkpoint.load, path, checkpoint.MASKS)) is None:
                    continue
                model = entry["model"]
                dataset = (entry["dataset"] or {}).get("name")
                network = (model["name"], model.get("width"), dataset, entry.get("mask_dataset") or dataset)
                seeds = (entry["source_seed"], entry["target_seed"])
                sparsity = float(path.stem.split("_")[1])
                key = (*network, sparsity, *seeds, entry["method"], entry["match_epoch"] if entry["method"] else None)
                if key in found:
                    raise UserError(f"{path} repeats the mask of {found[key]['path']}: keep experiments apart")
                found[key] = entry | {"path": path}
    if not found:
        raise UserError(f"no masks below {root}: run prune_imp.py first")
    return found


def overlaps(masks: dict[tuple, dict[str, Any]]) -> pd.DataFrame:
    """A row a mask of another network and layer, for the pairs whose target was pruned too; method naive: not permuted."""
    rows, seen = [], set()
    for key, entry in masks.items():
        model, width, dataset, mask_dataset, sparsity, source, target, *_ = key
        reference = masks.get((model, width, dataset, dataset, sparsity, target, None, None, None))
        if target is None or reference is None:
            continue
        rows += [dict(zip(MASK, key)) | row for row in overlap(entry["mask"], reference["mask"])]
        own = masks.get((model, width, mask_dataset, mask_dataset, sparsity, source, None, None, None))
        naive = (*key[: len(PAIR)], "naive", None)
        if own and naive not in seen:
            seen.add(naive)
            rows += [dict(zip(MASK, naive)) | row for row in overlap(own["mask"], reference["mask"])]
    return pd.DataFrame(rows, columns=[*MASK, "layer", "weights", "kept", "kept_reference", "shared", "chance"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By network, sparsity and method: shared and chance in percent of the reference's kept weights, over layers and pairs."""
    sums = table.groupby(MASK, dropna=False)[["kept_reference", "shared", "chance"]].sum()
    share = 100 * sums[["shared", "chance"]].div(sums["kept_reference"], axis=0)
    share["ratio"] = share["shared"] / share["chance"]
    group = [*NETWORK, "mask_dataset", "sparsity", "method", "match_epoch"]
    means = share.groupby(group, dropna=False).agg(["mean", "std", "count"])
    wide = {"shared": ("shared", "mean"), "shared_std": ("shared", "std"), "chance": ("chance", "mean"), "ratio": ("ratio", "mean"), "pairs": ("shared", "count")}  # fmt: skip
    return pd.DataFrame({name: means[key] for name, key in wide.items()}).reset_index()


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    masks = load_all(root)
    units, models = [], {}
    for key, entry in masks.items():
        about = json.dumps(entry["model"])
        if entry["model"].get("width") is None:
            continue  # a network that is not ours: its module is not known here
        if about not in models:
            models[about] = build_model(**entry["model"])
        units.append(dict(zip(MASK, key)) | idle_units(entry["mask"], models[about], entry["model"]["input_shape"]))
    layers = [
        dict(zip(MASK, key)) | {"layer": name, "weights": mask.numel(), "layer_sparsity": 1 - int(mask.sum()) / mask.numel()}
        for key, entry in masks.items() if entry["target_seed"] is None for name, mask in entry["mask"].items()
    ]  # fmt: skip
    checkpoint.save_text(pd.DataFrame(layers).to_csv(index=False), root / "layer_sparsity.csv")
    idle = pd.DataFrame(units, columns=[*MASK, "units", "without_inputs", "without_outputs"])
    checkpoint.save_text(idle.to_csv(index=False), root / "units.csv")
    idle = idle[idle["target_seed"].isna()].groupby([*NETWORK, "sparsity"])
    print("hidden units, and those without kept weights into them or out of them, mean over IMP's masks")
    print(idle[["units", "without_inputs", "without_outputs"]].mean().round(1).to_string())
    table = overlaps(masks)
    if table.empty:
        print("no target below this folder was pruned: run prune_imp.py on B to see how masks overlap")
        return
    checkpoint.save_text(table.to_csv(index=False), root / "masks.csv")
    print("\nweights that IMP keeps in B and the mask of A keeps too, in percent; ratio: shared over chance")
    print(summary(table).to_string(index=False, float_format="{:.3f}".format))
    print(f"wrote {root / 'masks.csv'}, layer_sparsity.csv and units.csv")


if __name__ == "__main__":
    cli.run(main)
