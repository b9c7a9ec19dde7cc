"""How differently the networks of an ensemble predict: `python -m analyze.diversity runs/quick` (Table 1).

A row for every set of two or more networks that differ in their seeds alone: the sparse networks of an arm in one
cell, the networks that IMP left at a sparsity, and the dense ones. Mean accuracy of the members, accuracy of the
ensemble (mean of the probabilities), disagreement (share of images on which two members predict different classes),
and the mean over images of the KL divergence (over ordered pairs) and the JS divergence (over unordered pairs), in
nats (Fort et al. 2020; Evci et al. 2022). All on the test set; each network's logits are kept beside it. Writes
diversity.csv.
"""

import itertools
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from analyze import style
from analyze.results import CELL, dense_runs, find_results, parse_root, readable, skipped, sparse_runs, variants
from common import checkpoint, cli
from common.data import reader
from common.errors import UserError
from common.models import build_model
from common.training import pick_device

COLUMNS = ["members", "mean_acc", "std_acc", "ensemble_acc", "disagreement", "kl", "js"]


def diversity(logits: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Accuracies in percent, disagreement in [0, 1], KL and JS in nats, of two or more (images, classes) logits."""
    logs = [F.log_softmax(one.double(), 1) for one in logits]
    guesses = [one.argmax(1) for one in logs]
    accuracies = torch.tensor([float((guess == labels).double().mean()) for guess in guesses])
    mean = torch.stack([one.exp() for one in logs]).mean(0)
    pairs = list(itertools.combinations(range(len(logs)), 2))

    def kl(p: Tensor, q: Tensor) -> float:
        return float((p.exp() * (p - q)).sum(1).mean())

    def js(p: Tensor, q: Tensor) -> float:
        middle = torch.logaddexp(p, q) - torch.tensor(2.0).log()
        return (kl(p, middle) + kl(q, middle)) / 2

    def average(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "members": len(logs),
        "mean_acc": 100 * float(accuracies.mean()),
        "std_acc": 100 * float(accuracies.std()),
        "ensemble_acc": 100 * float((mean.argmax(1) == labels).double().mean()),
        "disagreement": average([float((guesses[i] != guesses[j]).double().mean()) for i, j in pairs]),
        "kl": average([kl(logs[i], logs[j]) for i, j in itertools.permutations(range(len(logs)), 2)]),
        "js": average([js(logs[i], logs[j]) for i, j in pairs]),
    }


def networks(root: Path) -> pd.DataFrame:
    """All finished networks below `root`: model, width, dataset, sparsity, rewind, variant and file."""
    rows = []
    dense = dense_runs(root)
    for run in dense.itertuples():
        last = max(run.folder.glob("epoch_*.pt"), default=run.folder / "epoch_*.pt")
        rows.append((run.model, run.width, run.dataset, 0.0, None, "dense", run.seed, last))
    for run in find_results(root, "prune_imp"):
        for path in sorted(run["folder"].glob("sparse_*.pt")):
            if (model := readable(checkpoint.load, path, ("model", "dataset", "seed"))) is None:
                continue
            about = (model["model"]["name"], model["model"]["width"], model["dataset"]["name"])
            rows.append((*about, float(path.stem.partition("_")[2]), None, "IMP", model["seed"], path))
    try:
        sparse = sparse_runs(root)
        for run, variant in zip(sparse.itertuples(), variants(sparse)):
            rows.append(
                (
                    *(getattr(run, name) for name in CELL),
                    variant,
                    f"{run.source_seed}-{run.target_seed}-{run.seed}",
                    Path(run.path) / "final.pt",
                )
            )
    except UserError:  # no sparse run yet
        pass
    found = pd.DataFrame(rows, columns=[*CELL, "variant", "seeds", "file"])
    twice = found[found.duplicated([*CELL, "variant", "seeds"])]
    if len(twice):
        raise UserError(
            f"{twice['file'].iloc[0]} repeats the seed of another {twice['variant'].iloc[0]} network: keep experiments apart"
        )
    return found


class Predictor:
    """Logits of networks on the test set, computed once and kept beside each network's file."""

    def __init__(self, data_dir: str | None, device: torch.device, workers: int):
        self.device, self.read = device, reader(data_dir, device, workers)

    @torch.no_grad()
    def __call__(self, path: Path) -> tuple[Tensor, Tensor]:
        """The (images, classes) logits and the labels."""
        cache = path.with_name(f"logits_{path.stem}_{checkpoint.digest(path)[:8]}.pt")
        if cache.is_file():
            kept = checkpoint.load(cache, ("logits", "labels"))
            return kept["logits"], kept["labels"]
        entry = checkpoint.load(path, ("model", "dataset", "state_dict"))
        data = self.read(entry["dataset"])
        model = build_model(**entry["model"]).to(self.device, memory_format=torch.channels_last).eval()
        model.load_state_dict(entry["state_dict"])
        parts = [(model(images).float().cpu(), labels.cpu()) for images, labels in data.eval_batches()]
        logits, labels = (torch.cat(part) for part in zip(*parts))
        checkpoint.save({"logits": logits, "labels": labels}, cache)
        return logits, labels


def table(found: pd.DataFrame, predict: Predictor) -> pd.DataFrame:
    """A row a set of networks that has two or more members."""
    rows = []
    sizes = found.groupby([*CELL, "variant"], dropna=False)["file"].transform("size")
    sets = found[sizes > 1].groupby([*CELL, "variant"], dropna=False)
    for key, group in tqdm(sets, "sets", unit="set", disable=None):
        members = [one for path in group["file"] if (one := readable(predict, path))]
        if len(members) < 2:
            skipped(f"{key[-1]}: a set needs two members")
            continue
        logits, labels = zip(*members)
        rows.append(dict(zip([*CELL, "variant"], key)) | diversity(list(logits), labels[0]))
    return pd.DataFrame(rows, columns=[*CELL, "variant", *COLUMNS])


def main() -> None:
    parser = parse_root(__doc__)
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    found = networks(args.root)
    result = table(found, Predictor(args.data_dir, device, args.workers))
    if result.empty:
        raise UserError(f"no two finished networks of the same kind below {args.root}: train more seeds")
    checkpoint.save_text(result.to_csv(index=False), args.root / "diversity.csv")
    result["variant"] = result["variant"].map(style.label)
    for (model, width, dataset), group in result.groupby(CELL[:3]):
        print(f"\n{model} x{width:g} on {dataset}: accuracy in percent, KL and JS in nats")
        print(group.drop(columns=CELL[:3]).to_string(index=False, na_rep="", float_format="{:.3f}".format))
    print(f"wrote {args.root / 'diversity.csv'}")


if __name__ == "__main__":
    cli.run(main)
