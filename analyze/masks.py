"""How much masks have in common: `python -m analyze.masks runs/quick`.

For every pair of networks whose target was pruned too (its masks folder beside the source's): the
share of the weights that IMP keeps in B and that the mask of A keeps as well, before and after it
is permuted by each method, with what chance gives for masks of the same sparsity in every layer.
Also each mask's sparsity by layer, and the units that it leaves without inputs or without outputs.
Writes masks.csv, a row a mask and layer, layer_sparsity.csv and units.csv.
"""

import pandas as pd
import torch

from analyze.lib.overlap import MASK, load_all, overlaps, summary
from analyze.lib.runs import NETWORK, parse_root
from common import checkpoint, cli, masking
from common.align.axes import find_axes
from common.align.permutation import channel_rows, find_places
from common.masking import Mask
from common.models import build_model

IDLE = ["units", "without_inputs", "without_outputs"]


def idle_units(mask: Mask, model: torch.nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """How many hidden units there are, and have no kept weight left into them, or out of them.

    Weights that are never pruned count as kept.
    """
    axes, state = find_axes(model, input_shape), model.state_dict()
    weights = {
        name: mask.get(name, torch.ones_like(state[name], dtype=torch.bool))
        for name in masking.layer_weights(model)
    }
    counts = dict(zip(IDLE, (sum(axes.sizes.values()), 0, 0)))
    for axis, places in find_places(weights, axes).items():
        for dim, column in enumerate(IDLE[1:]):  # a weight is (outputs, inputs, ...)
            rows = [
                channel_rows(weights[place.tensor], place)
                for place in places
                if place.dim == dim
            ]
            if rows:
                counts[column] += int((~torch.cat(rows, 1).any(1)).sum())
    return counts


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    masks = load_all(root)
    units, layers = [], []
    for key, entry in masks.items():
        about, model = dict(zip(MASK, key)), entry["model"]
        if about["width"] is not None:  # else its module is not known here
            idle = idle_units(entry["mask"], build_model(**model), model["input_shape"])
            units.append(about | idle)
        if entry["target_seed"] is None:
            layers += [
                about
                | {"layer": name, "weights": mask.numel()}
                | {"layer_sparsity": 1 - int(mask.sum()) / mask.numel()}
                for name, mask in entry["mask"].items()
            ]
    idle = pd.DataFrame(units, columns=[*MASK, *IDLE])
    checkpoint.save_text(pd.DataFrame(layers).to_csv(index=False), root / "layer_sparsity.csv")
    checkpoint.save_text(idle.to_csv(index=False), root / "units.csv")
    idle = idle[idle["target_seed"].isna()].groupby([*NETWORK, "tag", "sparsity"])
    print("hidden units, and those without kept weights into or out of them, mean over IMP's masks")
    print(idle[IDLE].mean().round(1).to_string())
    table = overlaps(masks)
    if table.empty:
        print(
            "no target below this folder was pruned: run prune_imp.py on B to see how masks overlap"
        )
        return
    checkpoint.save_text(table.to_csv(index=False), root / "masks.csv")
    print("\nweights kept by IMP in B that the mask of A keeps too, in percent; ratio: over chance")
    print(summary(table).to_string(index=False, float_format="{:.3f}".format))
    print(f"wrote {root / 'masks.csv'}, layer_sparsity.csv and units.csv")


if __name__ == "__main__":
    cli.run(main)
