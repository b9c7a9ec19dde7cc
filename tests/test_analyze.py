import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyze import hours, rates, repair, results
from analyze.interpolation import along, barrier, line
from common.models import build_model
from common.training import evaluate
from tests.conftest import call, forks, refused, succeed


def test_barrier_by_hand():
    alphas = np.array([0, 0.25, 0.5, 0.75, 1.0])
    # The line from 1 to 3 is 1, 1.5, 2, 2.5, 3: the excesses are 0, 0.5, 2, 0.5, 0.
    assert barrier(np.array([1, 2, 4, 3, 3.0]), alphas) == pytest.approx(2)
    assert barrier(np.array([1, 1, 1, 1, 3.0]), alphas) == 0  # below the line there is no barrier


def test_line_by_hand():
    source = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}
    target = {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(5)}
    assert line(source, target, 0.25)["w"].tolist() == [0.25, 3.0] and line(source, target, 0.25)["n"] == 5
    assert line(source, target, 0.0)["w"].tolist() == [0, 4] and line(source, target, 1.0)["w"].tolist() == [1, 0]


def test_recomputed_batch_norm_is_the_cumulative_average():
    model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    batches = [torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([10.0, 20.0]).view(2, 1, 1, 1)]
    repair.recompute_batch_norm(model, batches)
    # Means 2 and 15; unbiased variances 2 and 50.
    assert model[0].running_mean.item() == pytest.approx(8.5) and model[0].running_var.item() == pytest.approx(26)
    assert model[0].momentum == 0.1 and not model.training


@pytest.mark.parametrize("name, size", [("mlp", 8), ("vgg11", 32)])
def test_rescaling_brings_every_hidden_layer_to_the_goal(name, size):
    models = [build_model(name, 0.125, 10, (3, size, size), seed).eval() for seed in (0, 1, 2)]
    batches = [torch.randn(20, 3, size, size) for _ in range(2)]
    ends = [repair.statistics(model, batches) for model in models[:2]]
    goal = repair.interpolate(*ends, 0.25)
    layer = list(goal)[1]
    assert torch.allclose(goal[layer][0], 0.75 * ends[0][layer][0] + 0.25 * ends[1][layer][0], atol=1e-6)
    repair.rescale(models[2], batches, goal)
    found = repair.statistics(models[2], batches)
    assert (
        len(found) == len([m for m in models[2].modules() if isinstance(m, (nn.Conv2d, nn.Linear))]) - 1
    )  # not the output
    for key in goal:
        assert torch.allclose(found[key][0], goal[key][0], atol=1e-4) and torch.allclose(
            found[key][1], goal[key][1], atol=1e-4
        ), key
    by_hand = models[0][1 if name == "mlp" else 0](batches[0].flatten(1) if name == "mlp" else batches[0])
    first = repair.statistics(models[0], batches[:1])[list(goal)[0]]
    dims = [dim for dim in range(by_hand.dim()) if dim != 1]
    assert torch.allclose(first[0], by_hand.mean(dims), atol=1e-5) and torch.allclose(
        first[1], by_hand.std(dims, correction=0), atol=1e-5
    )


@pytest.mark.parametrize("name, size", [("mlp", 8), ("resnet20", 8)])
def test_repair_at_the_endpoints_changes_nothing_and_interpolation_meets_them(name, size):
    model = build_model(name, 0.125 if name == "mlp" else 0.25, 10, (3, size, size))
    images = torch.randn(40, 3, size, size)
    if name == "resnet20":
        repair.recompute_batch_norm(model, [images])
    source = copy.deepcopy(model.state_dict())
    test, train = [(images[:20], torch.randint(10, (20,)))], [(images, torch.randint(10, (40,)))]
    target = {key: value + 0.3 * torch.randn_like(value) if value.dim() > 1 else value for key, value in source.items()}
    table = pd.DataFrame(along(model, source, target, np.array([0, 0.5, 1.0]), lambda: iter(test), lambda: iter(train)))
    pairs = table.pivot(index="alpha", columns="repair", values="test_loss")
    assert pairs.loc[0.0, True] == pytest.approx(pairs.loc[0.0, False], rel=1e-4)
    assert pairs.loc[0.5, True] != pytest.approx(pairs.loc[0.5, False], rel=1e-4)
    model.load_state_dict(line(source, target, 0.5))
    middle = table[(table["alpha"] == 0.5) & ~table["repair"]].iloc[0]
    for split, batches in (("test", test), ("train", train)):
        assert [middle[f"{split}_loss"], middle[f"{split}_acc"]] == pytest.approx(list(evaluate(model, batches)))


def test_the_line_is_measured_in_the_precision_of_the_runs():
    model = build_model("resnet20", 0.25, 3, (3, 8, 8))
    ends = [build_model("resnet20", 0.25, 3, (3, 8, 8), seed).state_dict() for seed in (0, 1)]
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.arange(16) % 3)]
    measured = {}
    for precision in ("fp32", "bf16"):
        rows = along(model, *ends, np.array([0.0, 1.0]), lambda: iter(batches), lambda: iter(batches), precision)
        model.load_state_dict(ends[0])
        assert rows[0]["test_loss"] == evaluate(model, batches, precision)[0]  # the metrics of the run itself
        repair.recompute_batch_norm(model, [images], precision)
        assert rows[1]["train_loss"] == evaluate(model, batches, precision)[0]
        measured[precision] = model.state_dict()["bn1.running_mean"].clone()
    assert not torch.equal(measured["fp32"], measured["bf16"])
    assert torch.allclose(measured["fp32"], measured["bf16"], atol=0.02)


def frame(rows):
    keys = {
        "model": "m",
        "width": 1.0,
        "dataset": "d",
        "mask_dataset": "d",
        "match_epoch": None,
        "sparsity": 0.9,
        "rewind": 0,
        "method": None,
        "signs": False,
    }
    return pd.DataFrame([keys | {"fan_in": False} | row for row in rows])


def run(arm, source, target, accuracy, **more):
    return {"arm": arm, "source_seed": source, "target_seed": target, "test_acc": accuracy} | more


def test_summary_by_hand():
    runs = frame([
        run("lth", 0, 0, 90.0), run("naive", 0, 1, 80.0), run("permuted", 0, 1, 83.0, method="activation"),
        run("lth", 2, 2, 92.0), run("naive", 2, 3, 78.0), run("permuted", 2, 3, 83.0, method="activation"),
    ])  # fmt: skip
    table = results.summary(runs).set_index("variant")
    assert table.loc["lth", "mean"] == 91 and table.loc["lth", "std"] == pytest.approx(2**0.5)
    permuted = table.loc["permuted"]
    assert permuted["difference"] == 4 and permuted["pairs"] == 2  # of 3 and 5
    assert permuted["difference_se"] == pytest.approx(1)  # sample std sqrt(2) over sqrt(2)
    assert permuted["gap_closed"] == pytest.approx(100 * 4 / 12) and table.loc["lth", "gap_closed"] == pytest.approx(
        100
    )
    text = results.render(runs)
    assert "91.00 ± 1.41" in text and "+4.00 ± 1.00 (33%)" in text


def test_variants_are_kept_apart_and_paired_with_their_seeds():
    runs = frame([
        run("lth", 0, 0, 90.0), run("imp-target", 1, 1, 91.0), run("imp-target", 5, 5, 50.0), run("naive", 0, 1, 80.0),
        run("naive", 0, 3, 70.0), run("permuted", 0, 1, 83.0, method="activation"),
        run("permuted", 0, 1, 84.0, method="masked"), run("permuted", 0, 1, 88.0, method="activation", signs=True),
    ])  # fmt: skip
    pairs = results.by_pair(runs)
    assert set(pairs) == {"lth", "imp-target", "naive", "permuted", "permuted (masked)", "permuted + signs"}
    assert pairs["naive"].tolist() == [80, 70] and pairs["lth"].tolist() == [90, 90]  # one source, two targets
    assert pairs["imp-target"].iloc[0] == 91 and pd.isna(pairs["imp-target"].iloc[1])
    table = results.summary(runs).set_index("variant")
    assert table.loc["permuted (masked)", "difference"] == 4 and table.loc["imp-target", "difference"] == 11
    assert table.loc["lth", "count"] == 1 and pd.isna(table.loc["lth", "std"])  # one run, though it serves two pairs


def test_early_matching_and_foreign_masks_are_variants_of_their_own():
    runs = frame([
        run("naive", 0, 1, 80.0), run("permuted", 0, 1, 83.0, method="activation", match_epoch=200),
        run("permuted", 0, 1, 60.0, method="activation", match_epoch=5), run("naive", 0, 1, 70.0, mask_dataset="e"),
    ])  # fmt: skip
    means = results.summary(runs).set_index("variant")["mean"].to_dict()
    assert means == {"naive": 80, "permuted": 83, "permuted @5": 60, "naive [e mask]": 70}


def test_a_foreign_mask_is_compared_with_its_own_naive_use():
    rows = [
        run(arm, 0, 1, accuracy, mask_dataset=mask, **({"method": "activation", "match_epoch": 5} if arm == "permuted" else {}))
        for arm, accuracy, mask in (("naive", 50.0, "d"), ("naive", 60.0, "e"), ("permuted", 64.0, "e"), ("permuted", 51.0, "d"))
    ]  # fmt: skip
    found = results.summary(frame(rows)).set_index("variant")["difference"].dropna()
    assert found.to_dict() == {"permuted": 1.0, "permuted [e mask]": 4.0}


def test_a_mask_of_another_data_set_and_the_same_seed_is_of_another_network():
    rows = [run("naive", 0, 0, 60.0, mask_dataset="e"), run("permuted", 0, 0, 64.0, mask_dataset="e", method="activation", match_epoch=5)]  # fmt: skip
    found = results.summary(frame(rows)).set_index("variant")["difference"].dropna()
    assert found.to_dict() == {"permuted [e mask]": 4.0}


def test_one_seed_has_no_spread_and_a_missing_arm_no_difference():
    one = results.render(frame([run("lth", 0, 0, 90.0), run("naive", 0, 1, 80.0)]))
    assert "90.00" in one and "nan" not in one and "90.00 ±" not in one and "+10.00 (100%)" in one
    assert "nan" not in results.render(frame([run("lth", 0, 0, 90.0)]))


def test_overall_averages_each_pair_over_the_cells_that_have_every_arm():
    rows = [run(arm, seed, seed + (arm != "lth"), base + 10 * k + seed, rewind=k, method="activation")
            for seed in (0, 2) for k in (0, 1) for arm, base in (("lth", 90), ("naive", 70), ("permuted", 75))]  # fmt: skip
    rows.append(run("naive", 0, 1, 5, rewind=2))
    table = results.overall(frame(rows)).set_index("variant")
    assert table.loc["naive", "mean"] == pytest.approx(70 + 5 + 1)
    assert table.loc["permuted", "difference"] == 5 and table.loc["permuted", "difference_se"] == 0


def test_networks_below_one_root_do_not_name_each_others_arms():
    rows = []
    for width, epochs in ((1.0, 20), (4.0, 200)):
        cell = {"width": width, "match_epoch": epochs, "method": "activation"}
        rows += [run("naive", 0, 1, 70.0, width=width), run("permuted", 0, 1, 75.0, **cell)]
        rows += [run("naive", 0, 1, 60.0, width=width, rewind=1), run("permuted", 0, 1, 65.0, rewind=1, **cell)]
    rows += [
        run("permuted", 0, 1, 79.0, method="masked", match_epoch=20),
        run("permuted", 0, 1, 69.0, rewind=1, method="masked", match_epoch=20),
    ]
    runs = frame(rows)
    assert set(results.variants(runs)) == {"naive", "permuted", "permuted (masked)"}
    table = results.overall(runs)
    assert table[table["width"] == 4].set_index("variant")["mean"].to_dict() == {"naive": 65, "permuted": 70}
    behind = results.summary(
        frame([run("lth", s, s, 70.0 - s) for s in (0, 2)] + [run("naive", s, s + 1, 80.0) for s in (0, 2)])
    )
    assert behind.set_index("variant").loc["lth", ["gap_closed", "gap_low", "gap_high"]].isna().all()  # there is no gap


def test_results_lists_every_finished_run_once(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs / "sparse", root / "somewhere/else")  # found by result.json, whatever the folders are called
    (root / "foreign").mkdir()
    (root / "foreign/result.json").write_text("{ half")
    unfinished = root / "somewhere/else/lth/seed0-seed0/s0.50_k000/result.json"
    unfinished.unlink()
    outcome = call("analyze.results", root)
    assert outcome.code == 0 and outcome.err.count("skipped") == 1 and "foreign" in outcome.err
    table = pd.read_csv(root / "results.csv")
    assert list(table.columns) == list(results.COLUMNS) and len(table) == 2 * 3 * 4 - 1
    assert set(table["arm"]) == {"lth", "naive", "permuted"}
    assert (
        table.loc[table["arm"] != "permuted", "method"].isna().all()
        and (table.loc[table["arm"] == "permuted", "method"] == "activation").all()
    )
    assert ",activation,3," in (root / "results.csv").read_text()  # a whole number, though naive runs have none
    lth = table[table["arm"] == "lth"]
    assert (lth["source_seed"] == lth["target_seed"]).all()
    row = table.iloc[0]
    result = json.loads((root / row["path"] / "result.json").read_text()) if row["path"].startswith("/") else None
    assert result and row["test_acc"] == pytest.approx(result["test_acc"]) and 0 <= row["test_acc"] <= 100
    assert "50%" in outcome.out and "minus naive" in outcome.out


def test_runs_of_two_experiments_are_not_averaged(runs, tmp_path):
    shutil.copytree(runs / "sparse", tmp_path / "one")
    shutil.copytree(runs / "sparse/lth", tmp_path / "two")
    outcome = call("analyze.results", tmp_path)
    assert outcome.code == 2 and "8 runs" in outcome.err and outcome.err.count("\n") == 1


def test_figures_and_their_data_are_written(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs, root)
    succeed("analyze.accuracy", root)
    out = succeed("analyze.interpolation", root, "--points", 3, "--images", 100, "--device", "cpu")
    for name in (
        "accuracy_rewind_mlp_glyphs",
        "accuracy_sparsity_mlp_glyphs",
        "interpolation_activation_mlp_glyphs_k003",
    ):
        for suffix in ("png", "pdf", "csv"):
            assert (root / "figures" / f"{name}.{suffix}").stat().st_size > 500
        pixels = results_image(root / "figures" / f"{name}.png")
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20  # not an empty page
    points = pd.read_csv(root / "figures/accuracy_rewind_mlp_glyphs.csv")
    one = points[(points["variant"] == "naive") & (points["sparsity"] == 0.7) & (points["rewind"] == 1)].iloc[0]
    by_hand = [
        json.loads((runs / f"sparse/naive/{pair}/s0.70_k001/result.json").read_text())["test_acc"]
        for pair in ("seed0-seed1", "seed2-seed3")
    ]
    assert (
        one["mean"] == pytest.approx(np.mean(by_hand))
        and one["std"] == pytest.approx(np.std(by_hand, ddof=1))
        and one["count"] == 2
    )
    table = pd.read_csv(root / "figures/interpolation_activation_mlp_glyphs_k003.csv")
    ends = table[table["alpha"].isin([0, 1]) & ~table["repair"]]
    dense = {seed: json.loads((runs / f"dense/seed{seed}/result.json").read_text())["test_acc"] for seed in range(4)}
    for row in ends.to_dict("records"):  # α = 0 is the source, permuted or not, and α = 1 the target
        assert row["test_acc"] == pytest.approx(dense[row["source_seed"] if row["alpha"] == 0 else row["target_seed"]])
    assert "barrier" in out
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("line_*.csv")}
    assert len(stamps) == 4  # a curve of A itself and one of π(A) for each pair
    succeed("analyze.interpolation", root, "--points", 3, "--images", 100, "--device", "cpu")
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("line_*.csv")}


def results_image(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("module", ["results", "accuracy", "interpolation"])
def test_an_empty_folder_is_one_line(tmp_path, module):
    for root, words in ((tmp_path, "no finished"), (tmp_path / "nowhere", "no such folder")):
        outcome = call(f"analyze.{module}", root)
        assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants the GPU hidden")
def test_benchmark_prints_ratios(tmp_path):
    tiny = ("--size", 8, "--steps", 1, "--repeats", 1, "--device", "cpu", "--out", tmp_path / "table.csv")
    out = succeed(
        "analyze.benchmark", "--only", "training", "parallel", "stacked", "data", "line", "matching", "weights", *tiny
    )
    for row in (
        "dense training",
        "masked training",
        "masked over dense",
        "side by side over one",
        "side by side, masked, over the plain way",
        "over stacked by vmap",
        "data alone",
        "line with REPAIR",
        "matching in one pass",
    ):
        assert row in out
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 11 and (table["ratio"] == table["min"]).all() and table["ours"].min() > 0
    refused(call("analyze.benchmark", "--only", "large", "--device", "cpu"), "--only large")


@forks
def test_arithmetic_and_epochs_of_a_preset_by_hand(monkeypatch):
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(256, 2))
    forward = 2 * (64 * 3 * 4 * 9 + 256 * 2)  # images need no gradient: the first layer goes backward once, not twice
    assert rates.flops(layer, 8) == 3 * forward - 2 * 64 * 3 * 4 * 9
    assert hours.rounds([0.2]) == 1 and hours.rounds([0.3, 0.36]) == 3 and hours.rounds([0.8, 0.9]) == 12
    # quick: six dense networks of 9 epochs, three chains of 12 rounds, 3 pairs x 3 arms x 2 sparsities x 2 epochs; of 3,000 images.
    share = 3000 / 10_000
    assert hours.epochs("quick") == {("resnet20", 2.0, "glyphs"): pytest.approx(share * (54 + 36 + 36))}
    # imagenet: two dense networks, a chain of 8 + 4 + 4 rounds, three arms of three sparsities at k = 10, 25, 50.
    expected = 2 * 80 + 16 * 20 + 9 * (70 + 55 + 30)
    assert hours.epochs("imagenet") == {("resnet50", 1.0, "imagenet"): expected}
    monkeypatch.setattr(
        hours, "measured", lambda rate, device: rate()
    )  # this process has used threads, and cannot fork
    table = hours.hours(("quick",), 1, torch.device("cpu"))
    assert table["hours"].item() == pytest.approx(
        table["epochs"].item() * 10_000 / table["images/s"].item() / 3600, rel=0.02
    )
