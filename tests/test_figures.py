"""Figures and tables of the paper beside ours, statistics, the report, and what is skipped."""

import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyze import report
from analyze.lib import panels, paper_numbers, statistics
from analyze.lib import runs as finished
from tests.conftest import call, refused, succeed


def test_intervals_by_hand():
    # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3).
    half = 4.302653 / 3**0.5
    found = statistics.t_interval(pd.Series([1.0, 2.0, 3.0]))
    assert found == pytest.approx((2 - half, 2 + half))
    assert math.isnan(statistics.t_interval(pd.Series([1.0]))[0])


def test_the_interval_of_a_ratio():
    interval = statistics.ratio_interval
    # With a denominator that never varies it is the interval of the numerator, divided.
    numerators, constant = pd.Series([1.0, 2.0, 3.0]), pd.Series([4.0, 4.0, 4.0])
    expected = [end / 4 for end in statistics.t_interval(numerators)]
    assert interval(numerators, constant) == pytest.approx(expected)
    # A ratio that is the same in every pair is known exactly.
    denominators = pd.Series([10.0, 11.0, 12.0])
    assert interval(0.5 * denominators, denominators) == pytest.approx((0.5, 0.5), abs=1e-6)
    maybe_zero, single = pd.Series([-5.0, 1.0, 5.0]), pd.Series([1.0])
    assert math.isnan(interval(numerators, maybe_zero)[0])
    assert math.isnan(interval(single, 2 * single)[0])
    # It covers the true ratio about as often as it says.
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        gap = pd.Series(rng.normal(10, 1, 4))
        low, high = interval(0.4 * gap + rng.normal(0, 1, 4), gap)
        covered += low <= 0.4 <= high
    assert 0.91 < covered / 400 < 0.985


def test_the_papers_numbers_by_our_names():
    table = paper_numbers.accuracies()
    table = table.set_index([*finished.CELL, "variant"])["mean"]
    assert table["resnet20", 1, "cifar10", 0.8, 0, "lth"] == 90.41
    assert table["resnet20", 1, "svhn", 0.97, 20, "permuted [cifar10 mask]"] == 92.61
    assert len(table) == 661 and table.index.is_unique and table.between(0, 100).all()
    dense = paper_numbers.dense().set_index(finished.NETWORK)["test_acc"]
    assert dense["resnet20", 16, "cifar10"] == 96.37


def test_the_report_holds_what_there_is_and_names_what_is_missing(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs, root)
    (root / "sparse/naive/seed0-seed1/s0.50_k000/result.json").write_text("{")  # cut off
    succeed("analyze.report", root, "--device", "cpu", "--grid", 3, "--points", 3, "--images", 100)
    text, page = (root / "report.md").read_text(), (root / "report.html").read_text()
    assert "Early matching (Table 15): no permuted runs matched at two epochs" in text
    assert "![accuracy_rewind_mlp_glyphs](figures/accuracy_rewind_mlp_glyphs.png)" in text
    assert page.count("data:image/png;base64,") >= 4
    assert "http" not in page.split("<body>")[0] and "<script" not in page
    table = statistics.summary(finished.sparse_runs(root)).query("variant == 'permuted'")
    low, high = table[["difference_low", "difference_high"]].iloc[-1]
    assert f"({low:.1f} to {high:.1f})" in text and f"({low:.1f} to {high:.1f})" in page
    code = finished.sparse_runs(root)["code"].iloc[0]
    assert "## Cost" in text and f"| {code} |" in text
    assert "train_sparse" in page and "weight_decay" in page
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(call("analyze.report", empty), "no finished run")
    blocks = [("title", "A"), ("table", pd.DataFrame({"x": [1.5], "y": [None]}))]
    assert report.markdown(blocks, root) == "# A\n\n| x | y |\n| --- | --- |\n| 1.5 |  |\n"


def test_the_report_runs_its_analyses_where_it_was_called(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / "mine")
    (tmp_path / "mine/imp/seed0/mask_0.70.pt").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    made, text = report.run("masks", Path("mine"), [])
    assert made and "sparsity of layers" in text
    assert "skipped mine/imp/seed0/mask_0.70.pt cannot be read" in text
    assert (tmp_path / "mine/layer_sparsity.csv").is_file()


def test_the_report_outlives_an_analysis_that_was_killed(tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    assert report.run("masks", tmp_path, []) == (False, "failed (exit code -9)")


def test_the_papers_figures_are_drawn_from_its_numbers(tmp_path):
    succeed("analyze.paper", tmp_path)
    table = pd.read_csv(tmp_path / "paper_accuracy_rewind_vgg11_cifar10.csv")
    assert len(table) == 42 and len(list(tmp_path.glob("paper_accuracy_*.pdf"))) == 10
    table = pd.read_csv(tmp_path / "paper_interpolation_resnet20_cifar10.csv")
    assert set(table["width"]) == {1, 4, 8, 16} and table["test_loss"].iloc[0] == 0.275


def test_a_curve_a_width():
    keys = ["width", "repair", "curve", "alpha", "seed"]
    values = ((1.0, 4.0), (False, True), ("naive", "aligned"), (0.0, 1.0), (0, 2))
    table = pd.DataFrame(itertools.product(*values), columns=keys)
    table["test_loss"] = table["width"] + table["alpha"] + table["seed"]
    figure = panels.widths(table, "")
    assert [axis.get_title() for axis in figure.axes] == ["without REPAIR", "with REPAIR"]
    for axis in figure.axes:
        curves = sorted(list(line.get_ydata()) for line in axis.lines)
        assert curves == [[2, 3], [2, 3], [5, 6], [5, 6]]  # means of seeds
        assert len({line.get_color() for line in axis.lines}) == 2
        assert len({line.get_linestyle() for line in axis.lines}) == 2
    # The paper drew π(A) with REPAIR only.
    figure = panels.widths(paper_numbers.of(paper_numbers.lines(), "resnet50", "imagenet"), "")
    assert len(figure.axes) == 1 and len(figure.axes[0].lines) == 2


def test_tables_1_and_15_stand_beside_ours(tmp_path):
    about = {"model": "resnet20", "width": 1.0, "dataset": "cifar10"}
    members = pd.DataFrame({"variant": ["IMP", "naive", "else"]})
    members = members.assign(**about, sparsity=0.9, rewind=25, mean_acc=1.0)
    elsewhere = members.assign(sparsity=0.8)  # where the paper has none
    pd.concat([members, elsewhere]).to_csv(tmp_path / "diversity.csv")
    found = report.beside_paper(tmp_path, "diversity").set_index("variant")
    assert list(found.index) == ["IMP", "naive"] and found.loc["naive", "ensemble_acc"] == 91.07
    assert found.loc["IMP", ["mean_acc", "mean_acc, paper", "js"]].tolist() == [1.0, 91.09, 0.13]
    dense = paper_numbers.ensembles().query("variant == 'dense' and dataset == 'cifar10'")
    assert dense["mean_acc"].item() == 92.76 and dense["sparsity"].item() == 0
    early = {"arm": ["permuted", "permuted", "naive"], "match_epoch": [5.0, 6.0, None]}
    early = pd.DataFrame(early).assign(**about, sparsity=0.8, rewind=20, mean=1.0, std=0.0)
    early.to_csv(tmp_path / "early_matching.csv")
    table = report.beside_paper(tmp_path, "early_matching")
    assert table["mean, paper"].tolist() == [90.49, 90.13]
    assert report.beside_paper(tmp_path, "masks").empty


def test_table_10_has_the_best_five_guesses_too(tmp_path):
    about = {"model": "resnet50", "width": 1, "dataset": "imagenet", "sparsity": 0.8, "rewind": 10}
    for arm, target, right in (("lth", 0, 70.0), ("naive", 1, 60.0)):
        seeds = {"source_seed": 0, "target_seed": target, "seed": 0}
        result = {"stage": "train_sparse", "arguments": about | {"arm": arm} | seeds}
        result |= {"test_acc": right, "test_top5": right + 20, "test_loss": 1}
        result |= {"seconds": 1, "sparsity_total": 0.8}
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "result.json").write_text(json.dumps(result))
    found = report.beside_paper(tmp_path, "results").set_index("variant")
    columns = ["mean", "top 5", "mean, paper", "top 5, paper"]
    assert found.loc["lth", columns].tolist() == [70, 90, 72.87, 91.13]
    assert found.loc["naive", ["top 5", "top 5, paper"]].tolist() == [80, 88.85]


@pytest.fixture(scope="module")
def littered(runs, tmp_path_factory):
    """The pipeline beside folders that are foreign, unfinished or cut off."""
    root = tmp_path_factory.mktemp("littered") / "runs"
    shutil.copytree(runs, root)
    metrics = {"test_acc": 1, "test_loss": 1, "seconds": 1, "sparsity_total": 1}
    contents = (
        {},
        {"stage": "train_sparse"},
        {"stage": "train_sparse", "arguments": {"arm": "lth"}} | metrics,
        {"stage": "train_dense", "arguments": {}},
        {"stage": "align_mask", "arguments": {"source_seed": 7}},
        {"stage": "prune_imp"},
    )
    for number, text in enumerate(("{", "[]", *map(json.dumps, contents))):
        (root / f"foreign{number}").mkdir()
        (root / f"foreign{number}/result.json").write_text(text)
    shutil.copytree(root / "sparse/naive/seed0-seed1/s0.70_k001", root / "unfinished")
    (root / "unfinished/result.json").unlink()
    cut = ("sparse_0.70.pt", "round_01.pt", "mask_0.70.pt")
    paths = [f"imp/seed0/{name}" for name in cut]
    paths += ["sparse/lth/seed0-seed0/s0.70_k001/final.pt"]
    for path in [*paths, "align/activation/seed0-seed1/permutation.pt"]:
        (root / path).write_bytes((root / path).read_bytes()[:500])
    (root / "sparse/lth/seed2-seed2/s0.50_k000/final.pt").unlink()  # as of a run that diverged
    return root


def test_results_skip_what_is_no_run(littered, runs):
    outcome = call("analyze.results", littered)
    # [] and {} say nothing of a stage.
    assert outcome.code == 0 and all(f"foreign{number}" in outcome.err for number in range(5))
    assert outcome.err.count("skipped") == 5 and outcome.err.count("\n") == 5
    ours, before = finished.sparse_runs(littered), finished.sparse_runs(runs)
    assert ours.drop(columns="path").equals(before.drop(columns="path"))
    assert len(finished.dense_runs(littered)) == len(finished.dense_runs(runs))


@pytest.mark.parametrize(
    "module, flags, cut",
    [
        ("diversity", (), ("s0.70_k001/final.pt", "s0.50_k000/final.pt", "sparse_0.70.pt")),
        ("imp_barrier", ("--points", 3, "--images", 64), ("round_01.pt", "foreign7")),
        ("interpolation", ("--points", 3, "--images", 64), ("permutation.pt",)),
        (
            "landscape",
            ("--grid", 3, "--images", 64, "--all"),
            ("permutation.pt", "s0.50_k000/final.pt"),
        ),
        ("masks", (), ("mask_0.70.pt",)),
        ("methods", (), ("permutation.pt",)),
    ],
)
def test_what_cannot_be_read_is_skipped_with_one_line(littered, module, flags, cut):
    device = () if module in ("masks", "methods") else ("--device", "cpu")
    outcome = call(f"analyze.{module}", littered, *flags, *device)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("skipped")]
    for name in cut:
        assert sum(name in line for line in lines) >= 1, (name, lines)
    if module == "diversity":  # a set of two that lost one is no set
        table = pd.read_csv(littered / "diversity.csv")
        assert len(table.query("variant == 'lth' and sparsity == 0.7 and rewind == 1")) == 0
        assert len(table.query("variant == 'naive' and sparsity == 0.7 and rewind == 1")) == 1
    if module == "interpolation":  # the other pair alone
        table = pd.read_csv(littered / "figures/interpolation_activation_mlp_glyphs_k003.csv")
        assert set(table.loc[table["curve"] == "aligned", "source_seed"]) == {2}


def test_the_papers_curves_stand_beside_ours(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs, root)
    out = succeed("analyze.accuracy", root, "--paper")
    assert "the paper has no accuracies of mlp on glyphs" in out
    ours = pd.DataFrame({"rewind": [0, 5], "mean": [1.0, 2.0]})
    ours = ours.assign(width=1.0, sparsity=0.8, variant="lth", std=0.1)
    levels = pd.DataFrame({"width": [1.0, 1.0], "tag": ["", "x"], "test_acc": [3.0, 4.0]})
    reference = paper_numbers.of(paper_numbers.accuracies(), "resnet20", "cifar10")
    figure = panels.accuracy(ours, levels, "rewind", "sparsity", "", reference)
    theirs, mine, *dense = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert len(theirs) == 9 and theirs[0] == 90.41 and mine == [1, 2]
    assert dense == [[3, 3], [4, 4]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["LTH", "dense", "dense [x]"]
