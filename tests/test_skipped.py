"""Every analysis skips files that it cannot use, with one line each."""

import itertools
import shutil

import pandas as pd
import pytest

from analyze.lib import runs as finished
from tests.conftest import call, edit

FOREIGN = """\
{
[]
{}
{"stage": "train_sparse"}
{"stage": "train_sparse", "arguments": {"arm": "lth"}, "test_acc": 1, "test_loss": 1, "seconds": 1}
{"stage": "train_dense", "arguments": {}}
{"stage": "align_mask", "arguments": {"source_seed": 7}}
{"stage": "prune_imp"}"""
REQUIRED = "arguments test_acc seconds sparsity rewind target_seed width".split()
STRINGS = "arm model dataset".split()
TRUNCATED = """
imp/seed0/sparse_0.70.pt
imp/seed0/round_01.pt
imp/seed0/mask_0.70.pt
sparse/lth/seed0-seed0/s0.70_k001/final.pt
align/activation/seed0-seed1/permutation.pt
"""


@pytest.fixture(scope="module")
def littered(runs, tmp_path_factory):
    """A part of the pipeline, and foreign, invalid, unfinished and truncated files."""
    root = tmp_path_factory.mktemp("littered") / "runs"
    ignore = shutil.ignore_patterns("round_0[2-5].pt", "s0.50_k001", "s0.70_k000")
    shutil.copytree(runs, root, ignore=ignore)
    for number, text in enumerate(FOREIGN.splitlines()):
        (root / f"foreign{number}").mkdir()
        (root / f"foreign{number}/result.json").write_text(text)
    run = root / "sparse/naive/seed0-seed1/s0.70_k001"
    for number, (key, value) in enumerate(itertools.product(REQUIRED, (None, "x", [], {}))):
        shutil.copytree(run, root / f"invalid{number}")
        edit(root, f"invalid{number}", **{key: value})
    for key in STRINGS:
        shutil.copytree(run, root / f"invalid_{key}")
        edit(root, f"invalid_{key}", **{key: []})
    shutil.copytree(run, root / "unfinished")
    (root / "unfinished/result.json").unlink()
    for path in TRUNCATED.split():
        (root / path).write_bytes((root / path).read_bytes()[:500])
    for folder in ("imp/seed0", "align/activation/seed0-seed1"):
        (root / folder / "mask_0.50 (copy).pt").write_bytes(b"")
    (root / "sparse/lth/seed2-seed2/s0.50_k000/final.pt").unlink()  # as for a diverged run
    return root


def test_results_skips_invalid_runs(littered, runs):
    outcome = call("analyze.results", littered)
    # The first three have no stage, the next two lack values, the others are of other stages.
    assert outcome.code == 0 and all(f"foreign{number}" in outcome.err for number in range(5))
    assert (
        outcome.err.count("skipped")
        == outcome.err.count("\n")
        == 5 + 4 * len(REQUIRED) + len(STRINGS)
    )
    cells = "sparsity == 0.5 and rewind == 0 or sparsity == 0.7 and rewind == 1"
    expected = finished.sparse_runs(runs).query(cells).reset_index(drop=True)
    table = finished.sparse_runs(littered)
    assert table.drop(columns="path").equals(expected.drop(columns="path"))
    assert len(finished.dense_runs(littered)) == len(finished.dense_runs(runs))


SKIPPED = {
    "diversity": "s0.70_k001/final.pt s0.50_k000/final.pt sparse_0.70.pt",
    "imp_barrier --points 3 --images 64": "round_01.pt foreign7",
    "interpolation --points 3 --images 64": "permutation.pt",
    "landscape --grid 3 --images 64 --all": "permutation.pt s0.50_k000/final.pt",
    "masks": "mask_0.70.pt",
    "methods": "permutation.pt",
}


@pytest.mark.parametrize("command", SKIPPED)
def test_unreadable_files_are_skipped_with_one_line(littered, command):
    name, *flags = command.split()
    outcome = call(f"analyze.{name}", littered, *flags)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("skipped")]
    for file in SKIPPED[command].split():
        assert any(file in line for line in lines), (file, lines)
    if name == "diversity":  # an ensemble of two that lost a member is skipped
        table = pd.read_csv(littered / "diversity.csv")
        table = table.query("sparsity == 0.7 and rewind == 1")
        assert "LTH" not in set(table["variant"]) and "naive" in set(table["variant"])
    if name == "interpolation":  # only the other pair is left
        table = pd.read_csv(littered / "figures/interpolation_activation_mlp_glyphs_k003.csv")
        assert set(table.loc[table["curve"] == "aligned", "source_seed"]) == {2}
