import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from analyze import results
from analyze.lib import repair, statistics, style
from analyze.lib import runs as finished
from analyze.lib.lines import barrier, interpolate, metrics_along
from common.models import build_model
from common.training import evaluate
from tests.conftest import call, refused, stage3, stage4, succeed


def test_barrier_by_hand():
    alphas = np.array([0, 0.25, 0.5, 0.75, 1.0])
    # The line from 1 to 3 is 1, 1.5, 2, 2.5, 3: the excesses are 0, 0.5, 2, 0.5, 0.
    assert barrier(np.array([1, 2, 4, 3, 3.0]), alphas) == pytest.approx(2)
    assert barrier(np.array([1, 1, 1, 1, 3.0]), alphas) == 0  # below the line there is no barrier


def test_line_by_hand():
    source = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}
    target = {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(5)}
    quarter = interpolate(source, target, 0.25)
    assert quarter["w"].tolist() == [0.25, 3.0] and quarter["n"] == 5
    ends = [interpolate(source, target, alpha)["w"].tolist() for alpha in (0.0, 1.0)]
    assert ends == [[0, 4], [1, 0]]


def test_recomputed_batch_norm_is_the_cumulative_average():
    model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    batches = [torch.tensor(pair).view(2, 1, 1, 1) for pair in ([1.0, 3.0], [10.0, 20.0])]
    repair.recompute_batch_norm(model, batches)
    # Means 2 and 15; unbiased variances 2 and 50.
    found = [model[0].running_mean.item(), model[0].running_var.item()]
    assert found == pytest.approx([8.5, 26])
    assert model[0].momentum == 0.1 and not model.training


@pytest.mark.parametrize("name, size", [("mlp", 8), ("vgg11", 32)])
def test_rescaling_brings_every_hidden_layer_to_the_goal(name, size):
    models = [build_model(name, 0.125, 10, (3, size, size), seed).eval() for seed in (0, 1, 2)]
    batches = [torch.randn(20, 3, size, size) for _ in range(2)]
    ends = [repair.statistics(model, batches) for model in models[:2]]
    goal = repair.interpolate(*ends, 0.25)
    first, second = list(goal)[:2]
    expected = 0.75 * ends[0][second][0] + 0.25 * ends[1][second][0]
    assert torch.allclose(goal[second][0], expected, atol=1e-6)
    repair.rescale(models[2], batches, goal)
    found = repair.statistics(models[2], batches)
    layers = [layer for layer in models[2].modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len(found) == len(layers) - 1  # not the output
    for key, wanted in goal.items():
        for one, other in zip(found[key], wanted):
            assert torch.allclose(one, other, atol=1e-4), key
    flat = name == "mlp"
    by_hand = models[0][int(flat)](batches[0].flatten(1) if flat else batches[0])
    mean, std = repair.statistics(models[0], batches[:1])[first]
    dims = [dim for dim in range(by_hand.dim()) if dim != 1]
    assert torch.allclose(mean, by_hand.mean(dims), atol=1e-5)
    assert torch.allclose(std, by_hand.std(dims, correction=0), atol=1e-5)


@pytest.mark.parametrize("name, size", [("mlp", 8), ("resnet20", 8)])
def test_repair_at_the_endpoints_changes_nothing_and_interpolation_meets_them(name, size):
    model = build_model(name, 0.125 if name == "mlp" else 0.25, 10, (3, size, size))
    images = torch.randn(40, 3, size, size)
    if name == "resnet20":
        repair.recompute_batch_norm(model, [images])
    source = copy.deepcopy(model.state_dict())
    test = [(images[:20], torch.randint(10, (20,)))]
    train = [(images, torch.randint(10, (40,)))]
    target = {
        key: value + 0.3 * torch.randn_like(value) if value.dim() > 1 else value
        for key, value in source.items()
    }
    alphas = np.array([0, 0.5, 1.0])
    rows = metrics_along(model, source, target, alphas, lambda: iter(test), lambda: iter(train))
    table = pd.DataFrame(rows)
    pairs = table.pivot(index="alpha", columns="repair", values="test_loss")
    assert pairs.loc[0.0, True] == pytest.approx(pairs.loc[0.0, False], rel=1e-4)
    assert pairs.loc[0.5, True] != pytest.approx(pairs.loc[0.5, False], rel=1e-4)
    model.load_state_dict(interpolate(source, target, 0.5))
    middle = table[(table["alpha"] == 0.5) & ~table["repair"]].iloc[0]
    for split, batches in (("test", test), ("train", train)):
        found = [middle[f"{split}_loss"], middle[f"{split}_acc"]]
        assert found == pytest.approx(list(evaluate(model, batches)))


def frame(*rows):
    common = {"model": "m", "width": 1.0, "dataset": "d", "mask_dataset": "d", "sparsity": 0.9}
    common |= {"rewind": 0, "match_epoch": None, "method": "activation", "signs": False, "tag": ""}
    common |= {"fan_in": False, "code": "abc", "mask_code": "m", "dense_epochs": 200}
    common |= {"diverged": None, "path": "somewhere", "settings": {}}
    table = pd.DataFrame([common | row for row in rows])
    return table.assign(variant=finished.variants(table))


def run(arm, source, target, accuracy, **more):
    seeds = {"source_seed": source, "target_seed": target}
    return {"arm": arm, "test_acc": accuracy} | seeds | more


def summary(*rows):
    return statistics.summary(frame(*rows)).set_index("variant")


def differences(*rows):
    return summary(*rows)["difference"].dropna().to_dict()


def test_summary_by_hand():
    rows = [run("lth", 0, 0, 90.0), run("naive", 0, 1, 80.0), run("permuted", 0, 1, 83.0)]
    rows += [run("lth", 2, 2, 92.0), run("naive", 2, 3, 78.0), run("permuted", 2, 3, 83.0)]
    table = summary(*rows)
    assert table.loc["lth", "mean"] == 91 and table.loc["lth", "std"] == pytest.approx(2**0.5)
    permuted = table.loc["permuted"]
    assert permuted["difference"] == 4 and permuted["pairs"] == 2  # of 3 and 5
    assert permuted["difference_se"] == pytest.approx(1)  # sample std sqrt(2) over sqrt(2)
    assert permuted["gap_closed"] == pytest.approx(100 * 4 / 12)
    assert table.loc["lth", "gap_closed"] == pytest.approx(100)
    text = results.render(frame(*rows))
    assert "91.00 ± 1.41" in text and "+4.00 ± 1.00 (33%)" in text


def test_variants_are_kept_apart_and_paired_with_their_seeds():
    rows = [run("lth", 0, 0, 90.0), run("imp-target", 1, 1, 91.0), run("imp-target", 5, 5, 50.0)]
    rows += [run("naive", 0, 1, 80.0), run("naive", 0, 3, 70.0), run("permuted", 0, 1, 83.0)]
    rows += [run("permuted", 0, 1, 84.0, method="masked"), run("permuted", 0, 1, 88.0, signs=True)]
    pairs = finished.by_pair(frame(*rows))
    permuted = {"permuted", "permuted (masked)", "permuted + signs"}
    assert set(pairs) == {"lth", "imp-target", "naive"} | permuted
    assert pairs["naive"].tolist() == [80, 70]
    assert pairs["lth"].tolist() == [90, 90]  # one source, two targets
    assert pairs["imp-target"].iloc[0] == 91 and pd.isna(pairs["imp-target"].iloc[1])
    table = summary(*rows)
    assert table.loc[["permuted (masked)", "imp-target"], "difference"].tolist() == [4, 11]
    # One run, though it serves two pairs.
    assert table.loc["lth", "count"] == 1 and pd.isna(table.loc["lth", "std"])


def test_early_matching_and_masks_of_another_data_set_are_variants_of_their_own():
    early = [run("permuted", 0, 1, accuracy, match_epoch=k) for accuracy, k in ((83, 200), (60, 5))]
    means = summary(run("naive", 0, 1, 80.0), run("naive", 0, 1, 70.0, mask_dataset="e"), *early)
    expected = {"naive": 80, "permuted": 83, "permuted @5": 60, "naive [e mask]": 70}
    assert means["mean"].to_dict() == expected


def test_a_mask_of_another_data_set_is_compared_with_its_own_naive_use():
    other = {"mask_dataset": "e"}
    here = [run("naive", 0, 1, 50.0), run("permuted", 0, 1, 51.0)]
    rows = [run("naive", 0, 1, 60.0, **other), run("permuted", 0, 1, 64.0, **other)]
    assert differences(*rows, *here) == {"permuted": 1.0, "permuted [e mask]": 4.0}
    # The same seed is another network there, so that these are a pair.
    same_seed = [row | {"target_seed": 0} for row in rows]
    assert differences(*same_seed) == {"permuted [e mask]": 4.0}


def test_a_tagged_variant_is_compared_with_the_naive_runs_of_its_tag():
    plain = [run("lth", 0, 0, 90.0), run("naive", 0, 1, 70.0), run("permuted", 0, 1, 75.0)]
    tagged = [row | {"tag": "adamw", "test_acc": row["test_acc"] * 0.8} for row in plain]
    table = summary(*plain, *tagged)
    assert table["mean"].to_dict() == {
        **{"lth": 90, "naive": 70, "permuted": 75},
        **{"lth [adamw]": 72, "naive [adamw]": 56, "permuted [adamw]": 60},
    }
    assert table.loc["permuted [adamw]", ["baseline", "difference"]].tolist() == [
        "naive [adamw]",
        4,
    ]
    assert table.loc["permuted [adamw]", "gap_closed"] == pytest.approx(100 * 4 / 16)
    assert table.loc["permuted", ["baseline", "difference"]].tolist() == ["naive", 5]
    alone = frame(*plain, tagged[2])  # no naive run of its tag
    row = statistics.summary(alone).set_index("variant").loc["permuted [adamw]"]
    assert row[["baseline", "difference", "gap_closed"]].tolist() == ["naive", -10, -50]
    text = results.render(alone)
    assert "naive without a tag" in text and "permuted [adamw]" in text
    both = results.render(frame(*plain, *tagged))
    assert "naive without a tag" not in both and "LTH [adamw]" in both


def test_tables_say_when_runs_were_made_by_different_code():
    rows = [
        run("lth", 0, 0, 90.0),
        run("lth", 2, 2, 91.0),
        run("naive", 0, 1, 70.0, code="abc+def"),
    ]
    assert "different code" not in results.render(frame(*rows[:2]))
    assert "different code: abc (2 runs), abc+def (1 runs)" in results.render(frame(*rows))
    masks = [run("lth", 4, 4, 80.0, mask_code="n"), run("lth", 6, 6, 80.0, mask_code="o", tag="t")]
    text = results.render(frame(*rows[:2], *masks))
    assert "masks were pruned by different code: m (2 runs), n (1 runs), o [t] (1 runs)" in text
    assert "pruned by different" not in results.render(frame(*rows[:2], masks[1]))
    elsewhere = run("naive", 0, 1, 70.0, code="ghi", model="n")  # is compared with none of these
    assert "different code" not in results.render(frame(*rows[:2], elsewhere))


@pytest.mark.parametrize("pairs", [((0, 1), (0, 3), (0, 5)), ((0, 1), (2, 1)), ((0, 1), (1, 2))])
def test_pairs_that_share_a_network_have_no_interval_and_a_line_says_so(pairs):
    def rows(pairs):
        arms = ("lth", 90), ("naive", 70), ("permuted", 80)
        return [
            run(arm, a, a if arm == "lth" else b, level + a + b / 10)
            for a, b in pairs
            for arm, level in arms
            if arm != "lth" or (a, b) == next(pair for pair in pairs if pair[0] == a)
        ]

    shared, apart = rows(pairs), rows([(0, 1), (2, 3), (4, 5)])
    intervals = ["difference_low", "difference_high", "gap_low", "gap_high"]
    found = summary(*shared).loc["permuted"]
    assert found["difference"] == pytest.approx(10) and found[intervals].isna().all()
    assert summary(*apart).loc["permuted", intervals].notna().all()
    assert (
        "share networks" in results.render(frame(*shared))
        and "*" not in results.render(frame(*shared))[:-300]
    )
    assert "share networks" not in results.render(frame(*apart))


def test_the_look_of_a_tagged_variant():
    looks = style.looks(["permuted [b]", "permuted", "lth [b]", "permuted [c]", "IMP"])
    assert list(looks) == ["lth [b]", "permuted", "permuted [b]", "permuted [c]", "IMP"]
    assert looks["lth [b]"]["label"] == "LTH [b]" and looks["IMP"]["label"] == "IMP"
    permuted = [looks[name] for name in list(looks)[1:4]]
    assert len({(look["color"], look["marker"]) for look in permuted}) == 1
    assert len({look["linestyle"] for look in permuted}) == 3


def test_one_seed_has_no_spread_and_a_missing_arm_no_difference():
    one = results.render(frame(run("lth", 0, 0, 90.0), run("naive", 0, 1, 80.0)))
    assert "nan" not in one and "90.00 ±" not in one
    assert "90.00" in one and "+10.00 (100%)" in one
    assert "nan" not in results.render(frame(run("lth", 0, 0, 90.0)))


def test_overall_averages_each_pair_over_the_cells_that_have_every_arm():
    levels = (("lth", 90), ("naive", 70), ("permuted", 75))
    rows = [
        run(arm, seed, seed + (arm != "lth"), level + 10 * k + seed, rewind=k)
        for seed in (0, 2)
        for k in (0, 1)
        for arm, level in levels
    ]
    runs = frame(*rows, run("naive", 0, 1, 5, rewind=2))
    table = statistics.overall(runs).set_index("variant")
    assert table.loc["naive", "mean"] == pytest.approx(70 + 5 + 1)
    assert table.loc["permuted", ["difference", "difference_se"]].tolist() == [5, 0]


def test_networks_below_one_root_do_not_name_each_others_arms():
    rows = []
    for rewind, level in ((0, 70.0), (1, 60.0)):
        for width, epochs in ((1.0, 20), (4.0, 200)):
            cell = {"width": width, "rewind": rewind}
            rows.append(run("naive", 0, 1, level, **cell))
            rows.append(run("permuted", 0, 1, level + 5, match_epoch=epochs, **cell))
        masked = {"method": "masked", "match_epoch": 20, "rewind": rewind}
        rows.append(run("permuted", 0, 1, level + 9, **masked))
    runs = frame(*rows)
    assert set(finished.variants(runs)) == {"naive", "permuted", "permuted (masked)"}
    table = statistics.overall(runs)
    wide = table[table["width"] == 4].set_index("variant")["mean"]
    assert wide.to_dict() == {"naive": 65, "permuted": 70}


def test_without_a_gap_there_is_no_share_of_it():
    rows = [run("lth", s, s, 70.0 - s) for s in (0, 2)]
    behind = summary(*rows, *(run("naive", s, s + 1, 80.0) for s in (0, 2)))
    assert behind.loc["lth", ["gap_closed", "gap_low", "gap_high"]].isna().all()


def test_results_lists_every_finished_run_once(runs, tmp_path):
    root = tmp_path / "runs"
    # Found by result.json, whatever the folders are called.
    shutil.copytree(runs / "sparse", root / "somewhere/else")
    (root / "broken").mkdir()
    (root / "broken/result.json").write_text("{ half")
    (root / "somewhere/else/lth/seed0-seed0/s0.50_k000/result.json").unlink()  # unfinished
    outcome = call("analyze.results", root)
    assert outcome.code == 0 and outcome.err.count("skipped") == 1 and "broken" in outcome.err
    table = pd.read_csv(root / "results.csv")
    assert list(table)[:8] == "tag code precision epochs arm signs fan_in model".split()
    assert list(table) == finished.COLUMNS and len(table) == 2 * 3 * 4 - 1
    assert set(table["arm"]) == {"lth", "naive", "permuted"}
    permuted = table["arm"] == "permuted"
    assert table.loc[~permuted, "method"].isna().all()
    assert (table.loc[permuted, "method"] == "activation").all()
    # A whole number, though naive runs have none.
    assert ",activation,3," in (root / "results.csv").read_text()
    lth = table[table["arm"] == "lth"]
    assert (lth["source_seed"] == lth["target_seed"]).all()
    row = table.iloc[0]
    result = json.loads((Path(row["path"]) / "result.json").read_text())
    assert row["test_acc"] == pytest.approx(result["test_acc"]) and 0 <= row["test_acc"] <= 100
    assert row[["code", "precision", "epochs"]].tolist() == [result["code"], "fp32", 3]
    assert table["tag"].isna().all()
    assert "50%" in outcome.out and "minus naive" in outcome.out


def edit_results(folder, **arguments):
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        result["arguments"] |= arguments
        path.write_text(json.dumps(result))


def test_runs_of_two_experiments_are_not_averaged_unless_a_tag_tells_them_apart(runs, tmp_path):
    shutil.copytree(runs / "sparse", tmp_path / "one")
    shutil.copytree(runs / "sparse/lth", tmp_path / "two")
    refused(call("analyze.results", tmp_path), "8 runs", "--tag")
    edit_results(tmp_path / "two", tag="adamw")
    assert "LTH [adamw]" in succeed("analyze.results", tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["tag"].value_counts().to_dict() == {"adamw": 8}


@pytest.mark.parametrize(
    "part, key",
    [
        ("arguments", "lr"),
        ("", "precision"),
        ("dense", "lr"),
        ("imp", "rewind"),
        ("dense", "limit_train"),
    ],
)
def test_runs_of_two_settings_have_columns_of_their_own(runs, tmp_path, part, key):
    shutil.copytree(runs / "sparse", tmp_path / "R")
    assert "=" not in succeed("analyze.results", tmp_path / "R").split("wrote")[0].replace("k=", "")
    for path in tmp_path.rglob("seed2*/*/result.json"):
        content = json.loads(path.read_text())
        (content[part] if part else content)[key] = "other"
        path.write_text(json.dumps(content))
    text, name = (
        succeed("analyze.results", tmp_path / "R"),
        f"{part} {key}".replace("arguments ", ""),
    )
    for label in ("naive", "LTH", "permuted"):
        assert f"{label} [{name.strip()}=other]" in text
    tags = pd.read_csv(tmp_path / "R/results.csv")["tag"].value_counts()
    assert len(tags) == 2 and set(tags) == {12}


def test_a_match_to_an_early_epoch_is_named_though_no_later_one_is_there(runs, ends, tmp_path):
    shutil.copytree(runs / "sparse/naive/seed0-seed1", tmp_path / "R/naive")
    succeed(*stage3(*ends, tmp_path / "align", "--target-epoch", 1))
    succeed(*stage4("permuted", ends[1], tmp_path / "align", tmp_path / "R/permuted"))
    assert "permuted @1" in succeed("analyze.results", tmp_path / "R")


def test_figures_and_their_data_are_written(runs, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(runs, root)
    succeed("analyze.accuracy", root)
    interpolation = ("--points", 3, "--images", 100, "--device", "cpu")
    out = succeed("analyze.interpolation", root, *interpolation)
    accuracy, lines = "accuracy_{}_mlp_glyphs", "interpolation_activation_mlp_glyphs_k003"
    figures = root / "figures"
    for name in (accuracy.format("rewind"), accuracy.format("sparsity"), lines):
        for suffix in ("png", "pdf", "csv"):
            assert (figures / f"{name}.{suffix}").stat().st_size > 500
        pixels = np.asarray(Image.open(figures / f"{name}.png").convert("RGB"))
        colours = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)
        assert len(colours) > 20  # not an empty page
    points = pd.read_csv(figures / f"{accuracy.format('rewind')}.csv")
    one = points.query("variant == 'naive' and sparsity == 0.7 and rewind == 1").iloc[0]
    by_hand = [
        json.loads((runs / f"sparse/naive/{pair}/s0.70_k001/result.json").read_text())["test_acc"]
        for pair in ("seed0-seed1", "seed2-seed3")
    ]
    expected = [np.mean(by_hand), np.std(by_hand, ddof=1), 2]
    assert one[["mean", "std", "count"]].tolist() == pytest.approx(expected)
    table = pd.read_csv(figures / f"{lines}.csv")
    ends = table[table["alpha"].isin([0, 1]) & ~table["repair"]]
    dense = finished.dense_runs(runs).set_index("seed")["test_acc"]
    for row in ends.to_dict(
        "records"
    ):  # α = 0 is the source, permuted or not, and α = 1 the target
        seed = row["source_seed"] if row["alpha"] == 0 else row["target_seed"]
        assert row["test_acc"] == pytest.approx(dense[seed])
    assert "barrier" in out
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("line_*.csv")}
    assert len(stamps) == 4  # a curve of A itself and one of π(A) for each pair
    succeed("analyze.interpolation", root, *interpolation)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("line_*.csv")}


@pytest.mark.parametrize("module", ["results", "accuracy", "interpolation"])
def test_an_empty_folder_is_one_line(tmp_path, module):
    for root, words in ((tmp_path, "no finished"), (tmp_path / "nowhere", "no such folder")):
        outcome = call(f"analyze.{module}", root)
        assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1
