"""The paper's numbers (paper_numbers.csv), in the terms of our tables."""

from pathlib import Path

import pandas as pd

from analyze.lib.runs import CELL, NETWORK, variant

NAMES = {
    "model": {"ResNet20": "resnet20", "VGG11": "vgg11", "ResNet50": "resnet50"},
    "dataset": {
        "CIFAR-10": "cifar10",
        "CIFAR-100": "cifar100",
        "ImageNet": "imagenet",
        "SVHN": "svhn",
    },
}
ARMS = {"LTH": "lth", "naive": "naive", "permuted": "permuted"}


def numbers(tables: str) -> pd.DataFrame:
    """The rows of some tables (a regular expression), by our names; sparsity as a share."""
    table = pd.read_csv(Path(__file__).with_suffix(".csv"))
    table = table[table["table"].str.fullmatch(tables)].replace(NAMES)
    table = table.rename(columns={"rewind_epoch": "rewind"}).astype({"width": float})
    return table.assign(variant=table["method"].map(ARMS), sparsity=table["sparsity"] / 100)


def accuracies(metrics: tuple[str, ...] = ("test_acc", "top1")) -> pd.DataFrame:
    """Tables 5 to 14, and 16 (masks of CIFAR-10): test accuracy in percent by cell and variant.

    Of ImageNet with the metric `top5`: how often the label is among five guesses.
    """
    table = numbers(r"table([5-9]|1[0-46])")
    table = table[table["metric"].isin(metrics) & table["match_epoch"].isna()]
    table = table[table["variant"].notna() & table["rewind"].notna()].astype({"rewind": int})
    reused = table["table"].eq("table16").map({True: "cifar10", False: None})
    table["variant"] = [variant(a, mask=mask) for a, mask in zip(table["variant"], reused)]
    return table[[*CELL, "variant", "mean", "std"]]


def ensembles() -> pd.DataFrame:
    """Table 1, a row a set: mean and ensemble accuracy in percent, disagreement, KL, JS in nats."""
    table = numbers("table1").fillna({"sparsity": 0})
    table["variant"] = table["variant"].fillna(table["method"])
    table["metric"] = table["metric"].replace("mean_test_acc", "mean_acc")
    wide = table.pivot(index=[*CELL[:4], "variant"], columns="metric", values="mean")
    return wide.rename_axis(columns=None).reset_index()


def early_matching() -> pd.DataFrame:
    """Table 15: test accuracy in percent by cell, arm and match epoch."""
    table = numbers("table15").rename(columns={"variant": "arm"})
    return table[[*CELL, "arm", "match_epoch", "mean", "std"]]


def lines() -> pd.DataFrame:
    """Figure 3: test loss in nats by network and alpha, from π(A) to B with REPAIR."""
    table = numbers("figure3").rename(columns={"mean": "test_loss"})
    alpha = table["method"].str.removeprefix("interp alpha=")
    table = table.assign(alpha=pd.to_numeric(alpha, errors="coerce"), curve="aligned", repair=True)
    return table.dropna(subset=["alpha", "model"])[
        [*NETWORK, "alpha", "curve", "repair", "test_loss"]
    ]


def dense() -> pd.DataFrame:
    """Test accuracy in percent of the dense networks, which have no tag."""
    table = numbers("figure-dense-line").rename(columns={"mean": "test_acc"})
    return table[[*NETWORK, "test_acc"]].assign(tag="")


def of(table: pd.DataFrame, model: str, dataset: str) -> pd.DataFrame:
    """The rows of one network and data set."""
    return table[(table["model"] == model) & (table["dataset"] == dataset)]
