"""What is no run of ours below a folder is skipped with a line, by every analysis."""

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
NEEDED = "arguments test_acc seconds sparsity rewind target_seed width".split()
WORDS = "arm model dataset".split()
CUT = """
imp/seed0/sparse_0.70.pt
imp/seed0/round_01.pt
imp/seed0/mask_0.70.pt
sparse/lth/seed0-seed0/s0.70_k001/final.pt
align/activation/seed0-seed1/permutation.pt
"""


@pytest.fixture(scope="module")
def littered(runs, tmp_path_factory):
    """A part of the pipeline beside folders that are foreign, unfinished or cut off."""
    root = tmp_path_factory.mktemp("littered") / "runs"
    few = shutil.ignore_patterns("round_0[2-5].pt", "s0.50_k001", "s0.70_k000")
    shutil.copytree(runs, root, ignore=few)
    for number, text in enumerate(FOREIGN.splitlines()):
        (root / f"foreign{number}").mkdir()
        (root / f"foreign{number}/result.json").write_text(text)
    run = root / "sparse/naive/seed0-seed1/s0.70_k001"
    for number, (key, value) in enumerate(itertools.product(NEEDED, (None, "x", [], {}))):
        shutil.copytree(run, root / f"spoilt{number}")
        edit(root, f"spoilt{number}", **{key: value})
    for key in WORDS:
        shutil.copytree(run, root / f"spoilt_{key}")
        edit(root, f"spoilt_{key}", **{key: []})
    shutil.copytree(run, root / "unfinished")
    (root / "unfinished/result.json").unlink()
    for path in CUT.split():
        (root / path).write_bytes((root / path).read_bytes()[:500])
    (root / "sparse/lth/seed2-seed2/s0.50_k000/final.pt").unlink()  # as of a run that diverged
    return root


def test_results_skip_what_is_no_run(littered, runs):
    outcome = call("analyze.results", littered)
    # [] and {} say nothing of a stage.
    assert outcome.code == 0 and all(f"foreign{number}" in outcome.err for number in range(5))
    assert (
        outcome.err.count("skipped") == outcome.err.count("\n") == 5 + 4 * len(NEEDED) + len(WORDS)
    )
    cells = "sparsity == 0.5 and rewind == 0 or sparsity == 0.7 and rewind == 1"
    before = finished.sparse_runs(runs).query(cells).reset_index(drop=True)
    ours = finished.sparse_runs(littered)
    assert ours.drop(columns="path").equals(before.drop(columns="path"))
    assert len(finished.dense_runs(littered)) == len(finished.dense_runs(runs))


NAMED = {
    "diversity": "s0.70_k001/final.pt s0.50_k000/final.pt sparse_0.70.pt",
    "imp_barrier --points 3 --images 64": "round_01.pt foreign7",
    "interpolation --points 3 --images 64": "permutation.pt",
    "landscape --grid 3 --images 64 --all": "permutation.pt s0.50_k000/final.pt",
    "masks": "mask_0.70.pt",
    "methods": "permutation.pt",
}


@pytest.mark.parametrize("command", NAMED)
def test_what_cannot_be_read_is_skipped_with_one_line(littered, command):
    name, *flags = command.split()
    outcome = call(f"analyze.{name}", littered, *flags)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("skipped")]
    for file in NAMED[command].split():
        assert any(file in line for line in lines), (file, lines)
    if name == "diversity":  # a set of two that lost one is no set
        table = pd.read_csv(littered / "diversity.csv")
        table = table.query("sparsity == 0.7 and rewind == 1")
        assert "LTH" not in set(table["variant"]) and "naive" in set(table["variant"])
    if name == "interpolation":  # the other pair alone
        table = pd.read_csv(littered / "figures/interpolation_activation_mlp_glyphs_k003.csv")
        assert set(table.loc[table["curve"] == "aligned", "source_seed"]) == {2}
