"""How much masks have in common: `python -m analyze.masks runs/quick`.

For every pair of networks whose target was pruned too (its masks folder beside the source's): the
share of the weights that IMP keeps in B and that the mask of A keeps as well, before and after it
is permuted by each method, with what chance gives for masks of the same sparsity in every layer.
Also the sparsity of each layer of IMP's masks. Writes masks.csv, a row a mask and layer, and
layer_sparsity.csv.
"""

import pandas as pd

from analyze.lib.overlap import MASK, load_all, overlaps, summary
from analyze.lib.runs import NETWORK, parse_root, save
from common import cli


def main() -> None:
    root = parse_root(__doc__).parse_args().root
    masks, layers = load_all(root), []
    for run in masks[masks["method"].isna()].to_dict("records"):
        for name, mask in run["entry"]["mask"].items():
            sparsity = 1 - int(mask.sum()) / mask.numel()
            row = {key: run[key] for key in MASK} | {"layer": name, "weights": mask.numel()}
            layers.append(row | {"layer_sparsity": sparsity})
    by_layer = pd.DataFrame(layers)
    save(by_layer, root / "layer_sparsity.csv")
    print("sparsity of layers in percent, mean over IMP's masks")
    groups = by_layer.groupby([*NETWORK, "tag", "sparsity", "layer"], sort=False)
    print((100 * groups["layer_sparsity"].mean()).unstack("sparsity").round(1).to_string())
    table = overlaps(masks)
    if table.empty:
        print("no target below this folder was pruned: run prune_imp.py on B to see masks overlap")
        return
    save(table, root / "masks.csv")
    print("\nweights kept by IMP in B that the mask of A keeps too, in percent; ratio: over chance")
    print(summary(table).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
