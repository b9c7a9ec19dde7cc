"""The paper's numbers (paper_numbers.csv), in the terms of our tables."""

from pathlib import Path

import pandas as pd

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


def dense() -> pd.DataFrame:
    """Test accuracy in percent of the dense networks, by model, width and dataset."""
    table = numbers()
    table = table[table["table"] == "figure-dense-line"]
    return table[["model", "width", "dataset", "mean"]].rename(columns={"mean": "test_acc"})
