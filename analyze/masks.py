"""How many weights masks share: `python -m analyze.masks runs/quick`.

For every pair of networks whose target was pruned too (its masks folder is beside the source's):
the share of the weights kept by IMP in B that the mask of A keeps as well, before and after it is
permuted by each method, and the share expected by chance from masks of the same layer sparsities.
Also the sparsity of each layer of IMP's masks. Writes masks.csv, a row per mask and layer, and
layer_sparsity.csv.
"""

import pandas as pd

from analyze.lib.overlap import MASK, load_masks, overlaps, summary
from analyze.lib.runs import NETWORK, root_parser, save_table
from common import cli
from common.errors import UserError


def main() -> None:
    root = root_parser(__doc__).parse_args().root
    masks, rows = load_masks(root), []
    if masks["method"].notna().all():
        raise UserError(f"only permuted masks below {root}: pass a folder with prune_imp.py's, too")
    for run in masks[masks["method"].isna()].to_dict("records"):
        for name, mask in run["entry"]["mask"].items():
            sparsity = 1 - int(mask.sum()) / mask.numel()
            row = {key: run[key] for key in MASK} | {"layer": name, "weights": mask.numel()}
            rows.append(row | {"layer_sparsity": sparsity})
    layers = pd.DataFrame(rows)
    save_table(layers, root / "layer_sparsity.csv")
    print("sparsity of layers in percent, mean over IMP's masks")
    groups = layers.groupby([*NETWORK, "tag", "sparsity", "layer"], sort=False)
    print((100 * groups["layer_sparsity"].mean()).unstack("sparsity").round(1).to_string())
    table = overlaps(masks)
    if table.empty:
        print("no IMP mask of a target, with the tag of a permuted mask: run prune_imp.py on B")
        return
    save_table(table, root / "masks.csv")
    print("\nweights kept by IMP in B that the mask of A keeps too, in percent; ratio: over chance")
    print(summary(table).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
