"""Shared by the tests: the stages called through their real entry points, at a tiny budget."""

import contextlib
import importlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import cli

TINY = [
    "--model",
    "mlp",
    "--width",
    "0.03125",
    "--image-size",
    "8",
    "--limit-train",
    "256",
    "--batch-size",
    "64",
    "--precision",
    "fp32",
    "--device",
    "cpu",
]


IMP = ("--epochs", 1, "--batch-size", 64, "--device", "cpu", "--precision", "fp32")


# Where there is a GPU, a process that has trained cannot fork one that trains: the stages never do, but tests here would.
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="trains before it forks")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def call(script: str, *arguments: object) -> Outcome:
    """Run a script's main as its command line does, in this process."""
    module = importlib.import_module(script)
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = [f"{script}.py", *map(str, arguments)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(module.main)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.argv = argv
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(script: str, *arguments: object) -> str:
    outcome = call(script, *arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def refused(outcome: Outcome, *words: object) -> None:
    """The script ended in one line that says all of `words`."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(one: dict, other: dict) -> bool:
    """Whether two state dicts hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def distance(one: dict, other: dict) -> float:
    """Of two state dicts, relative to the first."""
    a, b = (torch.cat([value.double().flatten() for value in weights.values()]) for weights in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks are fastest on one thread, and results then do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random tensors in a test, whatever ran before it: some make channels that only chance tells apart."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A finished pipeline: two pairs of tiny networks, every stage. Tests must not write into it."""
    root = tmp_path_factory.mktemp("runs")
    succeed("train_dense", *TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, 1, 2, 3, "--out", root / "dense")
    for a, b in ((0, 1), (2, 3)):
        succeed("prune_imp", "--dense", root / f"dense/seed{a}", "--sparsity", 0.5, 0.7, "--epochs", 1, "--batch-size", 64,
                "--keep-rounds", "--device", "cpu", "--precision", "fp32", "--out", root / f"imp/seed{a}")  # fmt: skip
        succeed("align_mask", "--source", root / f"dense/seed{a}", "--target", root / f"dense/seed{b}", "--masks", root / f"imp/seed{a}",
                "--device", "cpu", "--out", root / f"align/activation/seed{a}-seed{b}")  # fmt: skip
        for arm, seed, masks in (
            ("lth", a, f"imp/seed{a}"),
            ("naive", b, f"imp/seed{a}"),
            ("permuted", b, f"align/activation/seed{a}-seed{b}"),
        ):
            sparse(arm, root / f"dense/seed{seed}", root / masks, root / f"sparse/{arm}/seed{a}-seed{seed}")
    return root


def sparse(arm: str, weights: Path, masks: Path, out: Path, *more: object) -> Outcome:
    """Stage 4 at the tiny budget."""
    tiny = ("--batch-size", 64, "--device", "cpu", "--precision", "fp32")
    return call(
        "train_sparse",
        "--arm",
        arm,
        "--weights",
        weights,
        "--masks",
        masks,
        "--out",
        out,
        *tiny,
        *(more or ("--sparsity", 0.5, 0.7, "--rewind", 0, 1)),
    )


@pytest.fixture(scope="session")
def aligned(runs, tmp_path_factory) -> Path:
    """The masks of seed 0 permuted onto seed 1 by every method. Tests must not write into it."""
    root = tmp_path_factory.mktemp("aligned")
    for method in ("weight", "masked", "random", "identity"):
        ends = ("--source", runs / "dense/seed0", "--target", runs / "dense/seed1", "--masks", runs / "imp/seed0")
        out = succeed("align_mask", *ends, "--method", method, "--device", "cpu", "--out", root / method)
        assert "objective" in out and "same function" in out
    return root
