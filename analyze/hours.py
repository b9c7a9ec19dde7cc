"""How long the presets of run_all.sh would take to train, from what they print with DRY_RUN and the rates of a few steps."""

import os
import shlex
import subprocess
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from analyze.plain import BATCH
from analyze.rates import measured, network, random_images, training_rate
from common import cli
from common.parallel import pick_count

PRESETS = ("quick", "cifar10", "cifar100", "vgg11", "svhn", "imagenet")
IMAGES = {"glyphs": 10_000, "cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "imagenet": 1_281_167}


def epochs(preset: str) -> dict[tuple[str, float, str], float]:
    """Epochs that a preset of run_all.sh trains, by (model, width, data set), read off the commands that it prints."""
    script = Path(__file__).parents[1] / "run_all.sh"
    plain = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
    dry = subprocess.run(["bash", script, preset], env=plain | {"DRY_RUN": "1", "PARALLEL": ""}, capture_output=True, text=True, check=True)  # fmt: skip
    total: dict[tuple[str, float, str], float] = {}
    dense: dict[str, tuple] = {}  # what each dense folder holds, and the epochs it was trained
    for line in dry.stdout.splitlines():
        words = shlex.split(line)
        flags = {
            word: [value for value in _until_flag(words[place + 1 :])]
            for place, word in enumerate(words) if word.startswith("--")
        }  # fmt: skip
        if words[1] == "train_dense.py":
            (name,), (model,), (width,), (seed,), (out,) = (flags[key] for key in ("--dataset", "--model", "--width", "--seed", "--out"))  # fmt: skip
            key = (model, float(width), name)
            count = int(flags.get("--epochs", [cli.paper_value(cli.PAPER["dense"]["epochs"], name)])[0])
            share = int(flags["--limit-train"][0]) / IMAGES[name] if "--limit-train" in flags else 1
            dense[f"{out}/seed{seed}"] = (key, count, share)
        elif words[1] in ("prune_imp.py", "train_sparse.py"):
            key, whole, share = dense[flags.get("--dense", flags.get("--weights"))[0]]
            sparsities = [float(value) for value in flags["--sparsity"]]
            if words[1] == "prune_imp.py":
                each = int(flags.get("--epochs", [cli.paper_value(cli.PAPER["imp"]["epochs"], key[2])])[0])
                count = rounds(sparsities) * each
            else:
                count = len(sparsities) * sum(whole - int(k) for k in flags["--rewind"])
        else:
            continue
        total[key] = total.get(key, 0) + count * share
    return total


def _until_flag(words: list[str]) -> list[str]:
    return words[: next((place for place, word in enumerate(words) if word.startswith("--")), len(words))]


def rounds(sparsities: list[float]) -> int:
    """Rounds of an IMP chain through all of `sparsities`, at 20% of the remaining weights a round."""
    left, count = 1.0, 0
    for sparsity in sorted(sparsities):
        while left > 1 - sparsity + 1e-9:
            left, count = max(0.8 * left, 1 - sparsity), count + 1
    return count


def hours(presets: tuple[str, ...], steps: int, device: torch.device) -> pd.DataFrame:
    """A row a preset and network: epochs, images a second over a few steps, and hours of training alone, on images in memory."""
    rates: dict[tuple, float] = {}
    rows = []
    for preset in presets:
        for (model, width, name), count in epochs(preset).items():
            size = {"imagenet": 224, "glyphs": 16}.get(name, 32)
            batch = {"imagenet": 256 if device.type == "cuda" else 16}.get(name, BATCH)
            key = (model, width, size)
            if key not in rates:
                few = max(1, round(steps / width**2)) if device.type == "cpu" else steps
                few = 1 if name == "imagenet" and device.type == "cpu" else few
                data = random_images(few * batch, size, device)
                many = pick_count("auto", 99, width, data) if name != "imagenet" else 1
                models = [network(model, width, size, seed) for seed in range(many)]
                rate = partial(training_rate, models, data, batch, parallel=str(many) if many > 1 else None)
                rates[key] = measured(rate, device)
            rows.append({
                "preset": preset, "model": model, "width": width, "dataset": name, "epochs": round(count), "images/s": rates[key],
                "hours": count * IMAGES[name] / rates[key] / 3600,
            })  # fmt: skip
    return pd.DataFrame(rows)
