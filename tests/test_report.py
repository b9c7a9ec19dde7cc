"""Figures of accuracies, the paper's numbers beside ours, and the report."""

import io
import re
import shutil
import subprocess
import types
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analyze import report
from analyze.lib import lines, panels, paper_numbers, statistics, style
from analyze.lib import runs as finished
from common.arms import ARMS
from tests.conftest import call, edit, refused, savefig, succeed


@pytest.fixture
def root(runs, tmp_path):
    return shutil.copytree(runs, tmp_path / "runs")


@pytest.fixture
def in_process(monkeypatch):
    """Let the report run its analyses in this process, which saves the imports of each."""

    def run(command, **_):
        outcome = call(*command[2:])
        return subprocess.CompletedProcess(command, outcome.code, outcome.out, outcome.err)

    monkeypatch.setattr(report, "subprocess", types.SimpleNamespace(run=run))


def read_report(root):
    """Return the HTML of the report, and its text."""
    page = (root / "report.html").read_text()
    return page, " ".join(unescape(re.sub("<[^>]*>", " ", page)).split())


def curves_of(axis):
    return [list(line.get_ydata()) for line in axis.lines]


def move_to_paper_cells(root, model, dataset, rewinds, **metrics):
    """Edit the finished runs below `root` so that they are in cells of the paper's tables."""
    edit(root, model=model, width=1.0, dataset=dataset, mask_dataset=dataset, **metrics)
    for sparsity, new_sparsity in ((0.5, 0.8), (0.7, 0.9)):
        for rewind, new_rewind in enumerate(rewinds):
            edit(root, f"s{sparsity:.2f}_k{rewind:03d}", sparsity=new_sparsity, rewind=new_rewind)


def test_figures_and_their_data_are_written(root, monkeypatch):
    succeed("analyze.accuracy", root)
    interpolation = "analyze.interpolation", root, "--points 3 --images 100 --device cpu"
    with monkeypatch.context() as patched:
        patched.setattr(style.Figure, "savefig", savefig)  # with PDF, in full resolution
        assert "barrier" in succeed(*interpolation)
    figures, line = root / "figures", "interpolation_activation_mlp_glyphs_k003"
    assert (figures / f"{line}.pdf").stat().st_size > 5000
    tables = {path.stem: pd.read_csv(path) for path in figures.glob("*.csv")}
    assert tables.keys() == {line, "accuracy_sparsity_mlp_glyphs", "accuracy_rewind_mlp_glyphs"}
    for name in tables:
        pixels = np.asarray(Image.open(figures / f"{name}.png").convert("RGB"))
        colours = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)
        assert len(colours) > 20  # not an empty page
    points = tables["accuracy_rewind_mlp_glyphs"]
    cell = "variant == 'naive' and sparsity == 0.7 and rewind == 1"
    naive = finished.sparse_runs(root).query(cell)["test_acc"]
    row = points.query(cell)[["mean", "std", "count"]].iloc[0].tolist()
    assert row == pytest.approx([naive.mean(), naive.std(), 2])
    dense = finished.dense_runs(root).set_index("seed")["test_acc"]
    level = points[points["variant"] == "dense"]
    assert level["rewind"].isna().all() and level["mean"].item() == pytest.approx(dense.mean())
    for alpha, end in ((0, "source_seed"), (1, "target_seed")):  # permuted or not
        rows = tables[line].query(f"alpha == {alpha} and not repair")
        assert rows["test_acc"].tolist() == pytest.approx(rows[end].map(dense).tolist())
    assert len([*root.rglob("line_*.csv")]) == 4  # from A and from π(A), for each pair
    monkeypatch.setattr(lines, "evaluate_line", None)
    succeed(*interpolation)  # from the cache


def test_dense_networks_of_two_settings_have_levels_of_their_own(root):
    edit(root / "dense", "seed0", lr="other")
    assert sorted(finished.dense_runs(root)["tag"]) == 3 * ["lr=0.08"] + ["lr=other"]


# ---------------------------------------------------------------- the paper's numbers


def test_the_papers_numbers_have_our_names():
    table = paper_numbers.accuracies().dropna(subset="rewind")
    table = table.set_index([*finished.CELL, "variant"])["mean"]
    assert table["resnet20", 1, "cifar10", 0.8, 0, "LTH"] == 90.41
    assert table["resnet20", 1, "svhn", 0.97, 20, "permuted [cifar10 mask]"] == 92.61
    assert len(table) == 661 and table.index.is_unique and table.between(0, 100).all()
    masks = {"naive [cifar10 mask]", "permuted [cifar10 mask]"}
    assert {*table.index.get_level_values("variant")} == {"LTH", "naive", "permuted"} | masks


def test_the_papers_figures_are_drawn_from_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(style.Figure, "savefig", lambda *_, **__: None)  # would take minutes
    succeed("analyze.paper", tmp_path)
    table = pd.read_csv(tmp_path / "paper_accuracy_rewind_vgg11_cifar10.csv")
    assert len(table) == 42 + 2 and len(list(tmp_path.glob("paper_accuracy_*.pdf"))) == 10
    # Figure 7, and the level in each panel of Figure 11.
    assert len(pd.read_csv(tmp_path / "paper_top5_rewind_resnet50_imagenet.csv")) == 27
    axes = panels.draw_accuracy(table, "rewind", "sparsity", "").axes
    assert [curves_of(axis)[-1] for axis in axes] == [[91.64, 91.64], [91.52, 91.52]]
    table = pd.read_csv(tmp_path / "paper_interpolation_resnet20_cifar10.csv")
    assert set(table["width"]) == {1, 4, 8, 16} and table["test_loss"].iloc[0] == 0.275


def test_the_papers_curves_are_drawn_beside_ours(root):
    out = succeed("analyze.accuracy", root, "--paper")
    assert "the paper has no accuracies of mlp on glyphs" in out
    move_to_paper_cells(root, "resnet20", "cifar10", (0, 20), test_acc=90.0)
    succeed("analyze.accuracy", root, "--paper")
    points = pd.read_csv(root / "figures/accuracy_rewind_resnet20_cifar10.csv")
    assert len(points) == 2 * (4 * 3 + 1)  # in the same cells, and the dense level
    axis = panels.draw_accuracy(points, "rewind", "sparsity", "").axes[0]
    curves = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert curves["LTH"] == [90, 90] and curves["LTH (paper)"] == [90.41, 92.25]
    assert curves["dense (paper)"] == [92.88, 92.88] and len(curves) == 8


def test_each_width_has_a_curve():
    values = {"width": (1.0, 4.0), "repair": (False, True), "curve": ("naive", "aligned")}
    values |= {"alpha": (0.0, 1.0), "seed": (0, 2)}
    table = pd.MultiIndex.from_product(values.values(), names=values).to_frame(index=False)
    table["test_loss"] = table["width"] + table["alpha"] + table["seed"]
    table["test_acc"] = 10 * table["test_loss"]
    barriers = table.groupby(["width", "curve", "repair"])["seed"].mean() + np.arange(8)
    figure = panels.draw_lines(table, "", barriers)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["without REPAIR", "with REPAIR"]
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert len(legend) == 4 and "width 4, π(A) to B: barrier 5.000, REPAIR 6.000" in legend
    for axis, scale in zip(figure.axes, (1, 1, 10, 10)):  # loss above accuracy
        means = np.array([[2, 3], [2, 3], [5, 6], [5, 6]])  # over seeds
        assert sorted(curves_of(axis)) == (scale * means).tolist()
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 4


def test_tables_of_the_paper_beside_ours_as_text_csv_and_latex(root, in_process):
    refused(call("analyze.paper", "--table 15", root), "Table 15", "resnet20", "0.95", "rewind 20")
    move_to_paper_cells(root, "resnet20", "cifar10", (0, 20), test_acc=90.0)
    out = " ".join(succeed("analyze.paper", "--table 5", root).split())
    assert "k = 0 k = 20" in out and "k = 5" not in out and "nan" not in out
    assert "80% LTH ours 90.00 ± 0.00 90.00 ± 0.00 paper 90.41 ± 0.14 92.25 ± 0.14" in out
    succeed("analyze.report", root, "--only results")
    page, text = read_report(root)
    assert "<h3>Table 5</h3>" in page and "<h3>Table 15</h3>" in page and "Table 6" not in page
    assert "paper 90.41 ± 0.14 92.25 ± 0.14 difference -0.41 -2.25" in text
    table = pd.read_csv(root / "tables/table_5.csv").set_index(["variant", "sparsity", "rewind"])
    assert table.loc[("permuted", 0.9, 20), ["mean", "paper"]].tolist() == [90, 89.5]
    latex = (root / "tables/table_5.tex").read_text()
    assert r"\toprule" in latex and r"80\% & LTH & ours & 90.00 $\pm$ 0.00" in latex


def test_a_comparison_names_the_settings_and_variants_that_are_not_the_papers(root, in_process):
    move_to_paper_cells(root, "resnet20", "cifar10", (0, 20), test_acc=90.0)
    text = succeed("analyze.paper", "--table 5", root)
    assert "train_dense epochs 3 (200)" in text and "limit_train 256 (none)" in text
    assert "prune_imp epochs 1 (50)" in text and "weight_decay" not in text
    succeed("analyze.report", root, "--only results")
    assert "train_dense epochs 3 (200)" in read_report(root)[1]
    edit(root / "sparse/lth/seed0-seed0", "s0.50_k000", lr=0.7)
    refused(call("analyze.paper", "--table 5", root), "none of the variants", "naive [lr=0.02]")


def test_table_1_has_five_networks_of_one_source_and_is_never_stale(root, in_process):
    move_to_paper_cells(root, "resnet20", "cifar10", (10, 25), test_acc=90.0)
    cell = {"model": "resnet20", "width": 1, "dataset": "cifar10", "sparsity": 0.9, "rewind": 25}
    row = cell | {"variant": "naive", "js": 0.1}
    for members, sources, found in ((5, 1, True), (2, 1, False), (5, 2, False)):
        table = pd.DataFrame([row | {"members": members, "sources": sources}])
        table.to_csv(root / "diversity.csv", index=False)
        assert (call("analyze.paper", "--table 1", root).code == 0) == found
    refused(call("analyze.paper", "--table 1", root), "Table 1 needs ensembles of five")
    table.assign(members=5, sources=1).to_csv(root / "diversity.csv", index=False)
    succeed("analyze.report", root, "--only results")
    assert "Table 1<" not in read_report(root)[0]


ENSEMBLES = """\
variant sparsity rewind metric mean
IMP 0.9 - mean_acc 1
naive 0.9 25 js 0.1
naive 0.8 25 js 0.1
dense 0 - mean_acc 93"""


def test_table_1_is_compared_with_ensembles_of_any_rewind_epoch():
    ours = pd.read_csv(io.StringIO(ENSEMBLES), sep=" ", na_values="-")
    ours = ours.assign(model="resnet20", width=1.0, dataset="cifar10", std=None)
    comparison = paper_numbers.compare(1, ours).set_index("variant")
    assert comparison["paper"].to_dict() == {"dense": 92.76, "IMP": 91.09, "naive": 0.089}
    table = paper_numbers.layout(comparison.reset_index())
    assert table.columns.tolist() == ["test accuracy (%)", "JS (nats)"]
    assert "nan" not in table.to_string()


def test_imagenet_has_top_5_accuracy(root):
    move_to_paper_cells(root, "resnet50", "imagenet", (10, 25), test_acc=70.0, test_top5=90.0)
    succeed("analyze.accuracy", root)
    table = pd.read_csv(root / "figures/top5_rewind_resnet50_imagenet.csv")
    assert (table["mean"] == 90).all() and set(table["variant"]) > {"dense", "LTH"}
    table = paper_numbers.compare(10, paper_numbers.our_results(root))
    table = table.query("sparsity == 0.8 and rewind == 10").set_index(["variant", "metric"])
    for key, means in ((("LTH", "test_acc"), [70, 72.87]), (("naive", "test_top5"), [90, 88.85])):
        assert table.loc[key, ["mean", "paper"]].tolist() == means


# ---------------------------------------------------------------- the report


def test_the_report_has_every_section_or_its_reason_to_be_missing(root, in_process):
    edit(root / "dense", images={"train": 256, "test": 60}, test_acc=50.0)
    (root / "sparse/naive/seed0-seed1/s0.50_k000/result.json").write_text("{")  # truncated
    out = succeed("analyze.report", root, "--device cpu --grid 3 --points 3 --images 100")
    assert re.search(r"^results +\d+ s", out, re.M) and out.endswith(f"{root / 'report.html'}\n")
    page, text = read_report(root)
    finding = statistics.findings(statistics.summary(finished.sparse_runs(root)))[0]
    first = re.search("<p>(.*?)</p>", page)[1]
    # Only one pair is in every cell.
    assert unescape(first) == finding and "pairs of networks: 1" in finding
    # (p + w / 2 ± sqrt(w p (1 - p) + w² / 4)) / (1 + w) for p = 0.5 and w = 1.96² / 60.
    assert "lies between 37.7% and 62.3%" in text and "One test image is 1.7 points" in text
    assert "Early matching (Table 15) : no permuted runs matched by activations at two" in text
    assert '<img alt="accuracy_rewind_mlp_glyphs"' in page
    assert page.count("data:image/png;base64,") >= 4 and "<svg" in page and "<script" not in page
    assert not re.search(r"\bnan\b|NaN|\bNone\b", re.sub('base64,[^"]*', "", page))
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    for word in ("REPAIR", "sparsity", "naive", "https://arxiv.org/abs/2505.05143"):
        assert word in page
    for target in re.findall(r'href="([^"]+)"', page):  # links to headings and files are valid
        exists = f'id="{target[1:]}"' in page if target[0] == "#" else (root / target).is_file()
        assert exists or target.startswith("https:"), target
    assert "precision fp32 fp32 fp32" in text and "weight_decay" in page
    assert finished.sparse_runs(root)["code"].iloc[0] in text


def test_the_report_runs_only_the_requested_analyses(root, in_process):
    out = succeed("analyze.report", root, "--only results masks")
    page, text = read_report(root)
    assert "interpolation " not in out
    assert "The line from A to B (Figure 3) : not requested" in text
    assert 'href="summary.csv"' in page and "masks.csv" not in page
    refused(call("analyze.report", root, "--only nothing"), "nothing")
    shutil.rmtree(root / "sparse")
    succeed("analyze.report", root, "--only masks")
    assert "no finished sparse run below" in read_report(root)[1]
    (root / "empty").mkdir()
    refused(call("analyze.report", root / "empty"), "no finished run")


def test_each_size_of_a_data_set_is_stated():
    arguments, images = {"dataset": "svhn"}, {"train": 9, "test": 4}
    run = {"arguments": arguments, "test_acc": 50.0, "classes": 2, "images": images}
    facts = [*report.dataset_facts([run, run, run | {"images": images | {"train": 5}}])]
    assert [fact.split()[1] for fact in facts] == ["9", "5"]


def test_every_kind_of_run_is_explained_in_the_report():
    glossary = " ".join([*report.TEXT["words"], *report.TEXT["words"].values()])
    words = ARMS[3:] + ("(weight)", "(masked)", "(identity)", "@2", "+ signs", "+ fan-in", "[name]")
    assert "all" in report.TEXT["words"] and not [word for word in words if word not in glossary]


def test_variants_with_signs_have_one_colour():
    names = ["naive", "permuted", "permuted @2"]
    names += [f"permuted ({method})" for method in ("weight", "masked", "identity")]
    styles = style.variant_styles(names + [f"{name} + signs" for name in names])
    assert len({tuple(map(str, line.values())) for line in styles.values()}) == len(styles)
    colours = {signs: set() for signs in (True, False)}
    for name, line in styles.items():
        colours[name.endswith("+ signs")].add(line["color"])
    assert len(colours[True]) == 1 and not colours[True] & colours[False]
    assert [name.endswith("signs") for name in styles] == [False] * 6 + [True] * 6


def test_text_in_the_report_is_escaped():
    assert "<td>1 &lt;b&gt;</td>" in report.table(pd.DataFrame({"x": ["1 <b>"]}))
    assert report.heading("Is π(A) <B>?") == '<h2 id="is-π-a-b">Is π(A) &lt;B&gt;?</h2>'


def test_the_name_of_an_image_is_escaped(tmp_path):
    (tmp_path / 'plane_<a "b">.png').write_bytes(b"")
    html = report.image(tmp_path / 'plane_<a "b">.png')
    assert 'alt="plane_&lt;a &quot;b&quot;&gt;"' in html


def test_panels_are_sorted_by_number():
    cells = [(1.0, 5), (2.0, 0), (2.0, 5)]  # the first width has no k = 0
    points = pd.DataFrame(cells, columns=["width", "rewind"]).assign(sparsity=0.9)
    points = points.assign(variant="naive", mean=1.0, std=0.0)
    axes = panels.draw_accuracy(points, "sparsity", "rewind", "").axes
    assert [axis.get_title() for axis in axes[:2]] == ["rewind epoch k: 0", "rewind epoch k: 5"]


def test_narrow_networks_have_colours_of_their_own():
    styles = [tuple(style.width_style(width).values()) for width in (0.25, 0.5, 1, 2, 4, 8)]
    assert len({*styles}) == 6


def test_the_report_runs_analyses_in_the_current_folder(root, monkeypatch):
    (root / "imp/seed0/mask_0.70.pt").write_bytes(b"broken")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(root.parent)
    error, text, files = report.run("masks", Path("runs"), [])
    assert not error and "skipped runs/imp/seed0/mask_0.70.pt cannot be read" in text
    assert files == [Path("runs/layer_sparsity.csv")] and files[0].is_file()


def test_the_report_survives_an_analysis_that_is_killed(tmp_path, monkeypatch):
    process = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: process)
    assert report.run("masks", tmp_path, []) == ("failed (exit code -9)", "", [])
