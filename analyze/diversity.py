"""How differently the networks of an ensemble predict (Table 1).

    python -m analyze.diversity runs/quick

A row for every set of two or more networks that differ in their seeds alone: the sparse networks of
an arm in one cell, the networks that IMP left at a sparsity, and the dense ones. Mean accuracy of
the members, accuracy of the ensemble (mean of the probabilities), disagreement (share of images on
which two members predict different classes), and the mean over images of the KL divergence (over
ordered pairs) and the JS divergence (over unordered pairs), in nats (Fort et al. 2020; Evci et al.
2022). All on the whole test set in fp32. Writes diversity.csv.
"""

import contextlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from analyze.lib.lines import build
from analyze.lib.networks import arguments, imp_networks
from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    dense_runs,
    readable,
    refuse_repeats,
    save,
    skipped,
    sparse_runs,
    with_tag,
)
from common import checkpoint, cli, paths
from common.errors import UserError

SET = [*CELL, "variant"]  # what the members of an ensemble share


def diversity(logits: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Accuracies in percent, disagreement in [0, 1], KL and JS in nats, of several logits."""
    logs = [F.log_softmax(one.double(), 1) for one in logits]

    def accuracy(scores: Tensor) -> float:
        return 100 * float((scores.argmax(1) == labels).double().mean())

    def kl(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum(1).mean())

    def compare(p: Tensor, q: Tensor) -> dict[str, float]:
        middle = torch.logaddexp(p, q) - math.log(2)
        differ = float((p.argmax(1) != q.argmax(1)).double().mean())
        js = (kl(p, middle) + kl(q, middle)) / 2
        return {"disagreement": differ, "kl": (kl(p, q) + kl(q, p)) / 2, "js": js}

    alone = pd.Series([accuracy(one) for one in logs])
    found = {"members": len(logs), "mean_acc": alone.mean(), "std_acc": alone.std()}
    found["ensemble_acc"] = accuracy(sum(one.exp() for one in logs))
    pairs = [compare(*pair) for pair in itertools.combinations(logs, 2)]
    return found | pd.DataFrame(pairs).mean().to_dict()


def members(root: Path) -> pd.DataFrame:
    """All finished networks below `root`: cell, variant, seeds and file."""
    dense = dense_runs(root).assign(sparsity=0.0)
    dense["file"] = list(map(paths.epoch_file, dense["path"], dense["epochs"]))
    imp = imp_networks(root, rounds=False)
    parts = [dense, imp.assign(variant=with_tag("IMP", imp["tag"]))]
    with contextlib.suppress(UserError):  # none yet
        sparse = sparse_runs(root)
        seeds = sparse[[*SEEDS, "seed"]].astype(str).agg("-".join, axis=1)
        parts.append(sparse.assign(seed=seeds, file=sparse["path"].map(paths.final_file)))
    if not (parts := [part for part in parts if len(part)]):
        raise UserError(f"no finished network below {root}: run the stages first")
    found = pd.concat(parts).reindex(columns=[*SET, "seed", "file"])
    refuse_repeats(found, [*SET, "seed"], "file")
    return found


@torch.no_grad()
def predict(path: Path, read: Callable) -> tuple[Tensor, Tensor]:
    """Logits (images, classes) on the test set, in fp32 as results.csv has them, and the labels."""
    entry = checkpoint.load(path, checkpoint.WEIGHTS)
    data = read(entry["dataset"])
    model = build(entry, data).eval()
    parts = [(model(images), labels) for images, labels in data.eval_batches()]
    logits, labels = (torch.cat(part).cpu() for part in zip(*parts))
    return logits, labels


def table(found: pd.DataFrame, read: Callable) -> pd.DataFrame:
    """A row a set of networks that has two or more members."""
    rows = []
    sizes = found.groupby(SET, dropna=False)["file"].transform("size")
    sets = found[sizes > 1].groupby(SET, dropna=False)
    for key, group in tqdm(sets, "sets", unit="set", disable=None):
        predicted = [one for path in group["file"] if (one := readable(predict, path, read))]
        if len(predicted) < 2:
            skipped(f"{key[-1]}: a set needs two members")
            continue
        logits, labels = zip(*predicted)
        rows.append(dict(zip(SET, key)) | diversity(logits, labels[0]))
    return pd.DataFrame(rows)


def main() -> None:
    args = arguments(__doc__)
    result, root = table(members(args.root), args.read), args.root
    if result.empty:
        raise UserError(f"no two finished networks of the same kind below {root}: train more seeds")
    save(result, root / "diversity.csv")
    for (model, width, dataset), group in result.groupby(NETWORK):
        print(f"\n{model} x{width:g} on {dataset}: accuracy in percent, KL and JS in nats")
        shown = group.drop(columns=NETWORK)
        print(shown.to_string(index=False, na_rep="", float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
