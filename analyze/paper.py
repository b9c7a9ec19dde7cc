"""The paper's numbers (paper_numbers.csv), in the terms of our tables; its figures drawn by our code.

    python -m analyze.paper figures

Writes the paper's Figures 5 to 10 into the folder, from its own numbers.
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
    table["sparsity"] = pd.to_numeric(table["sparsity"]) / 100
    return table.assign(variant=table["method"].map(ARMS)).rename(columns={"rewind_epoch": "rewind"})


def accuracies() -> pd.DataFrame:
    """Test accuracy in percent by model, width, dataset, sparsity, rewind epoch and arm: Tables 5 to 14."""
    table = numbers()
    table = table[table["metric"].isin(["test_acc", "top1"]) & table["variant"].notna() & table["rewind"].notna()]
    table = table[table["match_epoch"].isna() & table["table"].str.fullmatch(r"table([5-9]|1[0-4])")]
    key = ["model", "width", "dataset", "sparsity", "rewind", "variant"]
    return table[[*key, "mean", "std"]].astype({"rewind": int, "width": float})


def of(table: pd.DataFrame, model: str, dataset: str) -> pd.DataFrame:
    """The rows of one network and data set."""
    return table[(table["model"] == model) & (table["dataset"] == dataset)]


def dense() -> pd.DataFrame:
    """Test accuracy in percent of the dense networks, by model, width and dataset."""
    table = numbers()
    table = table[table["table"] == "figure-dense-line"]
    return table[["model", "width", "dataset", "mean"]].rename(columns={"mean": "test_acc"})


def main() -> None:
    from analyze import accuracy, style  # here, because they read this module

    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the figures go")
    folder = parser.parse_args().folder
    table, levels = accuracies(), dense()
    for model, dataset in table[["model", "dataset"]].drop_duplicates().itertuples(index=False):
        points = of(table, model, dataset)
        for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
            figure = accuracy.plot(points, of(levels, model, dataset), x, panel, f"the paper: {model} on {dataset}")
            style.save(figure, points, folder, f"paper_accuracy_{x}_{model}_{dataset}")


if __name__ == "__main__":
    cli.run(main)
