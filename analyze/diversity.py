"""How differently the networks of an ensemble predict (Table 1).

    python -m analyze.diversity runs/quick

A row for every ensemble of two or more networks that differ only in their seeds: the sparse
networks of an arm in one cell, the networks pruned by IMP to one sparsity, and the dense networks.
Columns are the number of sources of the masks, the number of members, their mean accuracy, the
accuracy of the ensemble (mean of the probabilities), the disagreement (fraction of images on which
two members predict different classes) and the mean over images of the KL divergence (over ordered
pairs) and the JS divergence (over unordered pairs), in nats (Fort et al. 2020; Evci et al. 2022).
All are measured on the whole test set in fp32. Writes diversity.csv.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from analyze.lib.lines import load_network
from analyze.lib.networks import imp_networks, parse_args
from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    check_unique,
    dense_runs,
    find_results,
    save_table,
    sparse_runs,
    try_read,
    warn_skipped,
    with_tag,
)
from common import checkpoint, cli, paths
from common.errors import UserError

ENSEMBLE = [*CELL, "variant"]  # the columns in which all members agree


def diversity(logits: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Compare the logits of several networks, each (images, classes).

    Accuracies are in percent, disagreement in [0, 1], KL and JS divergence in nats.
    """
    log_probs = [F.log_softmax(scores.double(), 1) for scores in logits]

    def accuracy(scores: Tensor) -> float:
        return 100 * float((scores.argmax(1) == labels).double().mean())

    def kl(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum(1).mean())

    def compare(p: Tensor, q: Tensor) -> dict[str, float]:
        mean = torch.logaddexp(p, q) - math.log(2)
        disagreement = float((p.argmax(1) != q.argmax(1)).double().mean())
        js = (kl(p, mean) + kl(q, mean)) / 2
        return {"disagreement": disagreement, "kl": (kl(p, q) + kl(q, p)) / 2, "js": js}

    accuracies = pd.Series([accuracy(member) for member in log_probs])
    row = {"members": len(log_probs), "mean_acc": accuracies.mean(), "std_acc": accuracies.std()}
    row["ensemble_acc"] = accuracy(sum(member.exp() for member in log_probs))
    pairs = [compare(*pair) for pair in itertools.combinations(log_probs, 2)]
    return row | pd.DataFrame(pairs).mean().to_dict()


def find_networks(root: Path) -> pd.DataFrame:
    """Return all finished networks below `root`: ENSEMBLE, `source_seed`, `seed` and `file`."""
    dense = dense_runs(root).assign(sparsity=0.0)
    dense["file"] = list(map(paths.epoch_file, dense["path"], dense["epochs"]))
    imp = imp_networks(root, rounds=False)
    parts = [dense, imp.assign(variant=with_tag("IMP", imp["tag"]))]
    if find_results(root, "train_sparse") and (sparse := try_read(sparse_runs, root)) is not None:
        seeds = sparse[[*SEEDS, "seed"]].astype(str).agg("-".join, axis=1)
        parts.append(sparse.assign(seed=seeds, file=sparse["path"].map(paths.final_file)))
    if not (parts := [part for part in parts if len(part)]):
        raise UserError(f"no finished network below {root}: run the stages first")
    networks = pd.concat(parts).reindex(columns=[*ENSEMBLE, "source_seed", "seed", "file"])
    check_unique(networks, [*ENSEMBLE, "seed"], "file")
    return networks


@torch.no_grad()
def predict(path: Path, load_data: Callable) -> tuple[Tensor, Tensor]:
    """Return logits (images, classes) and labels of the test set, in fp32 as for results.csv."""
    entry = checkpoint.load(path, checkpoint.WEIGHTS)
    data = load_data(entry["dataset"])
    model = load_network(entry, data).eval()
    batches = [(model(images), labels) for images, labels in data.eval_batches()]
    logits, labels = (torch.cat(tensors).cpu() for tensors in zip(*batches))
    return logits, labels


def compare_members(networks: pd.DataFrame, load_data: Callable) -> pd.DataFrame:
    """Return the `diversity` of every ensemble of two or more networks, a row each."""
    rows = []
    sizes = networks.groupby(ENSEMBLE, dropna=False)["file"].transform("size")
    ensembles = networks[sizes > 1].groupby(ENSEMBLE, dropna=False)
    for key, group in tqdm(ensembles, "ensembles", unit="ensemble", disable=None):
        outputs = [
            output for path in group["file"] if (output := try_read(predict, path, load_data))
        ]
        if len(outputs) < 2:
            warn_skipped(f"{key[-1]}: an ensemble needs two members")
            continue
        logits, labels = zip(*outputs)
        row = dict(zip(ENSEMBLE, key)) | {"sources": group["source_seed"].nunique()}
        rows.append(row | diversity(logits, labels[0]))
    return pd.DataFrame(rows)


def main() -> None:
    args = parse_args(__doc__)
    root, networks = args.root, find_networks(args.root)
    table = compare_members(networks, args.load_data)
    if table.empty:
        raise UserError(f"no two finished networks of the same kind below {root}: train more seeds")
    save_table(table, root / "diversity.csv")
    for (model, width, dataset), group in table.groupby(NETWORK):
        print(f"\n{model} x{width:g} on {dataset}: accuracy in percent, KL and JS in nats")
        columns = group.drop(columns=NETWORK)
        print(columns.to_string(index=False, na_rep="", float_format="{:.3f}".format))
    if table["sources"].max() > 1:
        print("members have different sources; in the paper's Table 1 five share one (ENSEMBLE=5)")


if __name__ == "__main__":
    cli.run(main)
