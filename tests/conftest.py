"""Shared by the tests: the stages called through their real entry points, at a tiny budget."""

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

data.glyphs.TRAIN, data.glyphs.TEST = 500, 200  # images, which are drawn once
data.read_glyphs = functools.cache(data.read_glyphs)
savefig = Figure.savefig
os.fsync = lambda number: None  # no test outlives the machine


def sgd(momentum, weight_decay):
    """What the stages train with."""
    return partial(
        torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True
    )


# Where there is a GPU, a process that has trained cannot fork one that trains: the stages never do,
# but tests here would.
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="trains before it forks")


def fork(function, *arguments):
    """Start a function in a process of its own, which needs to import nothing."""

    def child():
        tqdm.set_lock(threading.RLock())  # its own, as it may die with it
        function(*arguments)

    process = get_context("fork").Process(target=child)
    process.start()
    return process


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def words(*command):
    """Those of a command, of which a part may hold several."""
    return " ".join(map(str, command)).split()


def start(*command, torchrun=False):
    """Run a script's main as its command line does, in this process."""
    script, *arguments = words(*command)
    module = importlib.import_module(script)
    with mock.patch.object(sys, "argv", [f"{script}.py", *arguments]):
        cli.run(module.main, torchrun)


def call(*command):
    """Run a script and tell how it ended."""
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
    """The script ended in one line that says all of `words`."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def refuse(command, *words):
    refused(call(*command), *words)


# ------------------------------------------------ commands at the tiny budget; later flags win


def stage1(out, *more):
    return f"train_dense {TINY} --epochs 3 --save-epochs 1 --out {out}", *more


def stage2(dense, out, *more):
    return f"prune_imp --dense {dense} --epochs 1 {FAST} --sparsity 0.5 0.7 --out {out}", *more


def stage3(source, target, masks, out, *more):
    ends = f"--source {source} --target {target} --masks {masks}"
    return f"align_mask {ends} --device cpu --out {out}", *more


def stage4(arm, weights, masks, out, *more):
    files = f"--weights {weights} --masks {masks} --out {out}"
    return f"train_sparse --arm {arm} {files} {FAST} --sparsity 0.5 0.7 --rewind 0 1", *more


def pipeline(root, a, b):
    """The commands of stages 2 to 4 for a pair of seeds."""
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
    """Stages 3 and 4 for a pair of seeds in a finished pipeline, once more in some other way."""
    source, target, pair = root / f"dense/seed{a}", root / f"dense/seed{b}", f"seed{a}-seed{b}"
    out = root / f"align/{name}/{pair}"
    succeed(*stage3(source, target, root / f"imp/seed{a}", out, flags))
    succeed(*stage4("permuted", target, out, root / f"sparse/permuted/{name}/{pair}"))


# The same for ResNet50 on the images of ImageNet in `root`.
JPEGS = "--batch-size 4 --lr 0.01 --workers 0 --warmup 0 --precision fp32 --device cpu"


def imagenet1(root, out, *more):
    network = "--dataset imagenet --model resnet50 --width 0.0625 --epochs 2 --save-epochs 1"
    return f"train_dense {network} {JPEGS} --data-dir {root}/data --out {out}", *more


def sparse(*arguments):
    return call(*stage4(*arguments))


# ---------------------------------------------------------------- what files and networks hold


def state(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return state(path)["state_dict"]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def edit(root, pattern="*", **values):
    """Change what finished runs below `root` say of themselves."""
    for path in root.rglob(f"{pattern}/**/result.json"):
        said = json.loads(path.read_text())
        for key, value in values.items():
            (said if key in said else said["arguments"])[key] = value
        path.write_text(json.dumps(said))


def same(one, other):
    """Whether two state dicts hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_files(root, other):
    """Every tensor and table below `root` is that of its namesake below `other`, but for times."""
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
    """What changes where a file or folder below `root` is written."""
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


def distance(one, other):
    """Of two state dicts, relative to the first."""
    both = [torch.cat([v.double().flatten() for v in part.values()]) for part in (one, other)]
    return float((both[0] - both[1]).norm() / both[0].norm())


def small_resnet(seed=0):
    return build_model("resnet20", 0.25, 2, (3, 8, 8), seed)


def small_cnn(seed=0):
    """A convolution with BatchNorm and a linear layer, for images of any size in ten classes."""
    with seeded_from(seed):
        features = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*features, nn.Flatten(), nn.Linear(4, 10))


def save_pictures(root, size=(12, 12), **counts):
    """Random images of (height, width) px in class folders cat and dog, so many in each split."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for folder in (root / split / "cat", root / split / "dog"):
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(256, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


@contextlib.contextmanager
def ending_at(rows, step, end):
    """Within it `end()` is called when a state is written, so many epochs and steps into a run."""
    save = checkpoint.save

    def ending(content, path):
        save(content, path)
        if content.get("step") == step and len(content["rows"]) == rows:
            end()

    with mock.patch.object(checkpoint, "save", ending):
        yield


def interrupt():
    raise InterruptedError


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Tiny networks are fastest on one thread, on which no number depends on the machine's cores.

    A run that is cut off goes on from its last epoch, however fast the epochs are. Pictures have
    few pixels, and there is no PDF: in full they take a second a figure.
    """

    def save_coarsely(figure, file, format):
        if format == "png":
            savefig(figure, file, format=format, dpi=40)

    torch.set_num_threads(1)
    resume.SAVE_INTERVAL = -1
    Figure.savefig = save_coarsely


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in a test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A finished pipeline: two pairs of tiny networks, all stages. Tests must not write into it."""
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
    """The masks of seed 0 permuted onto seed 1 by every method. Tests must not write into it."""
    root = tmp_path_factory.mktemp("aligned")
    for method in ("weight", "masked", "random", "identity"):
        out = succeed(*stage3(*ends, root / method, "--method", method))
        assert "objective" in out and "same function" in out
    return root
