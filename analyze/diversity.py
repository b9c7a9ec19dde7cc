"""How differently the networks of an ensemble predict (Table 1).

    python -m analyze.diversity runs/quick

A row for every set of two or more networks that differ in their seeds alone: the sparse networks of
an arm in one cell, the networks that IMP left at a sparsity, and the dense ones. Mean accuracy of
the members, accuracy of the ensemble (mean of the probabilities), disagreement (share of images on
which two members predict different classes), and the mean over images of the KL divergence (over
ordered pairs) and the JS divergence (over unordered pairs), in nats (Fort et al. 2020; Evci et al.
2022). All on the test set; each network's logits are kept beside it. Writes diversity.csv.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from analyze.lib import style
from analyze.lib.cache import code_digest
from analyze.lib.runs import (
    CELL,
    dense_runs,
    find_results,
    parse_root,
    readable,
    skipped,
    sparse_runs,
    variant,
    variants,
)
from common import checkpoint, cli, paths
from common.data import reader
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device

SET = [*CELL, "variant"]  # what the members of an ensemble share
COLUMNS = ["members", "mean_acc", "std_acc", "ensemble_acc", "disagreement", "kl", "js"]


def diversity(logits: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Accuracies in percent, disagreement in [0, 1], KL and JS in nats, of several logits."""
    logs = [F.log_softmax(one.double(), 1) for one in logits]
    guesses = [one.argmax(1) for one in logs]
    accuracies = 100 * torch.stack([(guess == labels).double().mean() for guess in guesses])
    mean = torch.stack([one.exp() for one in logs]).mean(0)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(1).mean()

    def js(p: Tensor, q: Tensor) -> Tensor:
        middle = torch.logaddexp(p, q) - torch.tensor(2.0).log()
        return (kl(p, middle) + kl(q, middle)) / 2

    def average(measure: Callable, pairs: itertools.combinations | itertools.permutations) -> float:
        return float(torch.stack([measure(*pair) for pair in pairs]).mean())

    def differ(one: Tensor, other: Tensor) -> Tensor:
        return (one != other).double().mean()

    values = (
        len(logs),
        float(accuracies.mean()),
        float(accuracies.std()),
        100 * float((mean.argmax(1) == labels).double().mean()),
        average(differ, itertools.combinations(guesses, 2)),
        average(kl, itertools.permutations(logs, 2)),
        average(js, itertools.combinations(logs, 2)),
    )
    return dict(zip(COLUMNS, values))


def networks(root: Path) -> pd.DataFrame:
    """All finished networks below `root`: cell, variant, seeds and file."""
    rows = []
    for run in dense_runs(root).itertuples():
        last = max(paths.epoch_files(run.folder).values(), default=paths.epoch_file(run.folder, 0))
        rows.append(
            (
                run.model,
                run.width,
                run.dataset,
                0.0,
                None,
                variant("dense", tag=run.tag),
                run.seed,
                last,
            )
        )
    for run in find_results(root, "prune_imp"):
        for sparsity, path in paths.imp_files(run["folder"]).items():
            if (entry := readable(checkpoint.load, path, ("model", "dataset", "seed"))) is None:
                continue
            about = (entry["model"]["name"], entry["model"]["width"], entry["dataset"]["name"])
            rows.append(
                (
                    *about,
                    sparsity,
                    None,
                    variant("IMP", tag=entry.get("tag") or ""),
                    entry["seed"],
                    path,
                )
            )
    try:
        sparse = sparse_runs(root)
    except UserError:  # none yet
        sparse = pd.DataFrame()
    for run, name in zip(sparse.itertuples(), variants(sparse) if len(sparse) else ()):
        cell = (getattr(run, name) for name in CELL)
        seeds = f"{run.source_seed}-{run.target_seed}-{run.seed}"
        rows.append((*cell, name, seeds, paths.final_file(Path(run.path))))
    found = pd.DataFrame(rows, columns=[*SET, "seeds", "file"])
    twice = found[found.duplicated([*SET, "seeds"])]
    if len(twice):
        file, name = twice[["file", "variant"]].iloc[0]
        raise UserError(
            f"{file} repeats the seed of another {name} network: keep experiments apart"
        )
    return found


@torch.no_grad()
def predict(path: Path, read: Callable) -> tuple[Tensor, Tensor]:
    """Logits (images, classes) on the test set and the labels; kept beside the network."""
    entry = checkpoint.load(path, ("model", "dataset", "state_dict"))
    made_by = code_digest(__file__), checkpoint.digest(path)[:8]
    cache = paths.cache_file(path, "logits", *made_by, suffix=".pt")
    if not cache.is_file():
        data = read(entry["dataset"])
        model = build_model(**entry["model"]).to(data.device, memory_format=torch.channels_last)
        model.eval().load_state_dict(entry["state_dict"])
        parts = [(model(images).float(), labels) for images, labels in data.eval_batches()]
        logits, labels = (torch.cat(part).cpu() for part in zip(*parts))
        checkpoint.save({"logits": logits, "labels": labels}, cache)
    kept = checkpoint.load(cache, ("logits", "labels"))
    return kept["logits"], kept["labels"]


def table(found: pd.DataFrame, read: Callable) -> pd.DataFrame:
    """A row a set of networks that has two or more members."""
    rows = []
    sizes = found.groupby(SET, dropna=False)["file"].transform("size")
    sets = found[sizes > 1].groupby(SET, dropna=False)
    for key, group in tqdm(sets, "sets", unit="set", disable=None):
        members = [one for path in group["file"] if (one := readable(predict, path, read))]
        if len(members) < 2:
            skipped(f"{key[-1]}: a set needs two members")
            continue
        logits, labels = zip(*members)
        rows.append(dict(zip(SET, key)) | diversity(logits, labels[0]))
    return pd.DataFrame(rows, columns=[*SET, *COLUMNS])


def main() -> None:
    parser = parse_root(__doc__)
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    read, root = reader(args.data_dir, pick_device(args.device), args.workers), args.root
    result = table(networks(root), read)
    if result.empty:
        raise UserError(f"no two finished networks of the same kind below {root}: train more seeds")
    checkpoint.save_text(result.to_csv(index=False), root / "diversity.csv")
    result["variant"] = result["variant"].map(style.label)
    for (model, width, dataset), group in result.groupby(CELL[:3]):
        print(f"\n{model} x{width:g} on {dataset}: accuracy in percent, KL and JS in nats")
        shown = group.drop(columns=CELL[:3])
        print(shown.to_string(index=False, na_rep="", float_format="{:.3f}".format))
    print(f"wrote {root / 'diversity.csv'}")


if __name__ == "__main__":
    cli.run(main)
