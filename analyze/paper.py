"""The paper's numbers (paper_numbers.csv), in the terms of our tables; its figures drawn by our code.

    python -m analyze.paper figures

Writes the paper's Figures 3 and 5 to 10 into the folder, from its own numbers.
"""

from pathlib import Path

import pandas as pd

from common import cli

MODELS = {"ResNet20": "resnet20", "VGG11": "vgg11", "ResNet50": "resnet50"}
DATASETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet": "imagenet", "SVHN": "svhn"}
ARMS = {"LTH": "lth", "naive": "naive", "permuted": "permuted"}


def numbers() -> pd.DataFrame:
    """All rows, with models, data sets and arms by our names and sparsity as a share."""
    table = pd.read_csv(Path(__file__).with_name("paper_numbers.csv"))
    table["model"], table["dataset"] = table["model"].map(MODELS), table["dataset"].map(DATASETS)
    table["sparsity"], table["width"] = pd.to_numeric(table["sparsity"]) / 100, table["width"].astype(float)
    return table.assign(variant=table["method"].map(ARMS)).rename(columns={"rewind_epoch": "rewind"})


def accuracies(metrics: tuple[str, ...] = ("test_acc", "top1")) -> pd.DataFrame:
    """Test accuracy in percent by model, width, dataset, sparsity, rewind epoch and arm: Tables 5 to 14, and 16 (masks of CIFAR-10).

    Of ImageNet with the metric `top5`: how often the label is among five guesses.
    """
    table = numbers()
    table = table[table["metric"].isin(metrics) & table["variant"].notna() & table["rewind"].notna()]
    table = table[table["match_epoch"].isna() & table["table"].str.fullmatch(r"table([5-9]|1[0-46])")]
    reused = table["table"] == "table16"
    table["variant"] = table["variant"].where(~reused, table["variant"] + " [cifar10 mask]")
    key = ["model", "width", "dataset", "sparsity", "rewind", "variant"]
    return table[[*key, "mean", "std"]].astype({"rewind": int, "width": float})


def ensembles() -> pd.DataFrame:
    """Table 1, a row a set: mean and ensemble accuracy in percent, disagreement, KL and JS in nats."""
    table = numbers()
    table = table[table["table"] == "table1"].assign(variant=lambda t: t["variant"].fillna(t["method"]))
    table["sparsity"] = table["sparsity"].fillna(0)
    table["metric"] = table["metric"].replace("mean_test_acc", "mean_acc")
    wide = table.pivot(index=["model", "width", "dataset", "sparsity", "variant"], columns="metric", values="mean")
    return wide.rename_axis(columns=None).reset_index()


def early_matching() -> pd.DataFrame:
    """Table 15: test accuracy in percent by sparsity, rewind epoch, arm and match epoch."""
    table = numbers()
    table = table[table["table"] == "table15"].rename(columns={"variant": "arm"})
    return table[["model", "width", "dataset", "sparsity", "rewind", "arm", "match_epoch", "mean", "std"]]


def lines() -> pd.DataFrame:
    """Figure 3: test loss in nats by model, width, dataset and alpha, from π(A) to B with REPAIR."""
    table = numbers()
    table["alpha"] = pd.to_numeric(table["method"].str.removeprefix("interp alpha="), errors="coerce")
    table = table[(table["table"] == "figure3") & table["alpha"].notna() & table["model"].notna()]
    table = table.rename(columns={"mean": "test_loss"}).assign(curve="aligned", repair=True)
    return table[["model", "width", "dataset", "alpha", "curve", "repair", "test_loss"]]


def of(table: pd.DataFrame, model: str, dataset: str) -> pd.DataFrame:
    """The rows of one network and data set."""
    return table[(table["model"] == model) & (table["dataset"] == dataset)]


def dense() -> pd.DataFrame:
    """Test accuracy in percent of the dense networks, by model, width and dataset."""
    table = numbers()
    table = table[table["table"] == "figure-dense-line"]
    return table[["model", "width", "dataset", "mean"]].rename(columns={"mean": "test_acc"})


def main() -> None:
    from analyze import accuracy, interpolation, style  # here, because they read this module

    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the figures go")
    folder = parser.parse_args().folder
    table, levels = accuracies(), dense()
    for model, dataset in table[["model", "dataset"]].drop_duplicates().itertuples(index=False):
        points = of(table, model, dataset)
        for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
            figure = accuracy.plot(points, of(levels, model, dataset), x, panel, f"the paper: {model} on {dataset}")
            style.save(figure, points, folder, f"paper_accuracy_{x}_{model}_{dataset}")
    for (model, dataset), points in lines().groupby(["model", "dataset"]):
        figure = interpolation.plot_widths(points, f"the paper: {model} on {dataset}")
        style.save(figure, points, folder, f"paper_interpolation_{model}_{dataset}")


if __name__ == "__main__":
    cli.run(main)
