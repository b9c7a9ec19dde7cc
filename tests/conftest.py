"""Shared helpers and fixtures: run the stages through their entry points at a tiny budget."""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
import threading
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import checkpoint, cli, data
from common.models import build_model
from common.runtime import resume
from common.runtime.seeding import seeded as seeded_from

FAST = "--batch-size 64 --precision fp32 --device cpu"
TINY = f"--model mlp --width 0.03125 --image-size 8 --limit-train 256 {FAST}"

data.glyphs.TRAIN, data.glyphs.TEST = 500, 200  # images, generated once
data.read_glyphs = functools.cache(data.read_glyphs)
savefig = Figure.savefig
os.fsync = lambda descriptor: None  # tests need no protection against crashes of the machine


def sgd(momentum, weight_decay):
    """The optimiser of the stages."""
    return partial(
        torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True
    )


# A process that has used CUDA cannot fork one that trains. The stages never do, some tests would.
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="trains before it forks")


def fork(function, *arguments):
    """Start a function in a forked process, which has all modules imported already."""

    def child():
        tqdm.set_lock(threading.RLock())  # not shared: the child may be killed while it holds it
        function(*arguments)

    process = get_context("fork").Process(target=child)
    process.start()
    return process


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def words(*command):
    """Split a command, given in parts of one or more words, into a list of words."""
    return " ".join(map(str, command)).split()


def start(*command, torchrun=False):
    """Run a script's main in this process, as the command line does."""
    script, *arguments = words(*command)
    module = importlib.import_module(script)
    with mock.patch.object(sys, "argv", [f"{script}.py", *arguments]):
        cli.run(module.main, torchrun)


def call(*command):
    """Run a script; return its exit code and output."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            start(*command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*command):
    outcome = call(*command)
    assert outcome.code == 0, outcome.err
    return outcome.out


def refused(outcome, *words):
    """Assert that the script ended with exit code 2 and a one-line error containing `words`."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def refuse(command, *words):
    refused(call(*command), *words)


# ------------------------------------- commands at the tiny budget; later flags override earlier


def stage1(out, *flags):
    return f"train_dense {TINY} --epochs 3 --save-epochs 1 --out {out}", *flags


def stage2(dense, out, *flags):
    return f"prune_imp --dense {dense} --epochs 1 {FAST} --sparsity 0.5 0.7 --out {out}", *flags


def stage3(source, target, masks, out, *flags):
    inputs = f"--source {source} --target {target} --masks {masks}"
    return f"align_mask {inputs} --device cpu --out {out}", *flags


def stage4(arm, weights, masks, out, *flags):
    paths = f"--weights {weights} --masks {masks} --out {out}"
    return f"train_sparse --arm {arm} {paths} {FAST} --sparsity 0.5 0.7 --rewind 0 1", *flags


def pipeline(root, a, b):
    """Yield the commands of stages 2 to 4 for source seed `a` and target seed `b`."""
    source, target, masks = (
        root / name for name in (f"dense/seed{a}", f"dense/seed{b}", f"imp/seed{a}")
    )
    aligned = root / f"align/activation/seed{a}-seed{b}"
    yield stage2(source, masks, "--keep-rounds")
    yield stage3(source, target, masks, aligned)
    yield stage4("lth", source, masks, root / f"sparse/lth/seed{a}-seed{a}")
    for arm, folder in (("naive", masks), ("permuted", aligned)):
        yield stage4(arm, target, folder, root / f"sparse/{arm}/seed{a}-seed{b}")


def align_and_train(root, a, b, name, flags):
    """Run stages 3 and 4 for a pair of a finished pipeline again, with other alignment flags."""
    source, target, pair = root / f"dense/seed{a}", root / f"dense/seed{b}", f"seed{a}-seed{b}"
    out = root / f"align/{name}/{pair}"
    succeed(*stage3(source, target, root / f"imp/seed{a}", out, flags))
    succeed(*stage4("permuted", target, out, root / f"sparse/permuted/{name}/{pair}"))


# Stage 1 for ResNet50 on ImageNet's folder layout in root/data.
JPEGS = "--batch-size 4 --lr 0.01 --workers 0 --warmup 0 --precision fp32 --device cpu"


def imagenet1(root, out, *flags):
    network = "--dataset imagenet --model resnet50 --width 0.0625 --epochs 2 --save-epochs 1"
    return f"train_dense {network} {JPEGS} --data-dir {root}/data --out {out}", *flags


# ---------------------------------------------------------------- contents of files and networks


def state(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return state(path)["state_dict"]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def edit(root, pattern="*", **values):
    """Change entries or arguments in result.json of finished runs below `root`."""
    for path in root.rglob(f"{pattern}/**/result.json"):
        result = json.loads(path.read_text())
        for key, value in values.items():
            (result if key in result else result["arguments"])[key] = value
        path.write_text(json.dumps(result))


def same(a, b):
    """Whether two dicts of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_files(root, other):
    """Assert that tensors and tables below `root` equal those below `other`, except for times."""
    paths = [path for path in root.rglob("*") if path.suffix in (".pt", ".csv")]
    assert paths
    for path in paths:
        pair = path, other / path.relative_to(root)
        if path.suffix == ".pt":
            for key in {"state_dict", "mask", "signs", "permutation"} & state(path).keys():
                assert same(*(state(file)[key] for file in pair)), path
        else:
            tables = (pd.read_csv(file).drop(columns="seconds", errors="ignore") for file in pair)
            pd.testing.assert_frame_equal(*tables, check_exact=True, obj=str(path))


def snapshot(root):
    """Return size, time and inode of all files below `root`, to detect any write."""
    stats = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


def distance(a, b):
    """Euclidean distance between two state dicts, relative to the norm of the first."""
    a, b = (torch.cat([v.double().flatten() for v in weights.values()]) for weights in (a, b))
    return float((a - b).norm() / a.norm())


def small_resnet(seed=0):
    return build_model("resnet20", 0.25, 2, (3, 8, 8), seed)


def small_cnn(seed=0):
    """A convolution, BatchNorm and a linear layer, for images of any size and ten classes."""
    with seeded_from(seed):
        features = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*features, nn.Flatten(), nn.Linear(4, 10))


def save_images(root, size=(12, 12), **counts):
    """Write random images of (height, width) px to class folders cat and dog of each split."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for folder in (root / split / "cat", root / split / "dog"):
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


@contextlib.contextmanager
def ending_at(rows, step, end):
    """Call `end()` once resume.pt is saved after `rows` epochs and `step` steps of the next."""
    save = checkpoint.save

    def save_and_end(content, path):
        save(content, path)
        if content.get("step") == step and len(content["rows"]) == rows:
            end()

    with mock.patch.object(checkpoint, "save", save_and_end):
        yield


def interrupt():
    raise InterruptedError


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Make tests fast and independent of the machine.

    One thread is fastest for tiny networks, and results do not depend on the number of cores. Runs
    save their state after every epoch, however short. Figures have a low resolution and no PDF,
    which saves a second each.
    """

    def save_coarsely(figure, file, format):
        if format == "png":
            savefig(figure, file, format=format, dpi=40)

    torch.set_num_threads(1)
    resume.SAVE_INTERVAL = -1
    Figure.savefig = save_coarsely


@pytest.fixture(autouse=True)
def seeded():
    """Give a test the same random tensors, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A finished pipeline: all stages for two pairs of tiny networks. Read-only for tests."""
    root = tmp_path_factory.mktemp("runs")
    succeed(*stage1(root / "dense", "--seed 0 1 2 3"))
    for command in (*pipeline(root, 0, 1), *pipeline(root, 2, 3)):
        succeed(*command)
    return root


@pytest.fixture(scope="session")
def ends(runs):
    """Source, target and the source's masks of the first pair."""
    return runs / "dense/seed0", runs / "dense/seed1", runs / "imp/seed0"


@pytest.fixture(scope="session")
def aligned(ends, tmp_path_factory):
    """The masks of seed 0 permuted onto seed 1 by every method. Read-only for tests."""
    root = tmp_path_factory.mktemp("aligned")
    for method in ("weight", "masked", "random", "identity"):
        out = succeed(*stage3(*ends, root / method, "--method", method))
        assert "objective" in out and "same function" in out
    return root
