"""The runs below a folder as one table, its statistics, and what analyze.results says of them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyze import results
from analyze.lib import runs as finished
from analyze.lib import statistics, style
from tests.conftest import call, refused, stage3, stage4, succeed

PAIRS = ((0, 1), (2, 3), (4, 5))
LEVELS = {"lth": 90.0, "naive": 70.0, "permuted": 80.0}


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


def grid(pairs=PAIRS, levels=LEVELS, **more):
    """A run of each arm for every pair; LTH once for each source."""
    runs = {
        (arm, a, a if arm == "lth" else b): level for a, b in pairs for arm, level in levels.items()
    }
    return [run(*key, level + key[1] / 10 + key[2] / 7, **more) for key, level in runs.items()]


def summary(*rows):
    return statistics.summary(frame(*rows)).query("sparsity.notna()").set_index("variant")


def differences(*rows):
    return summary(*rows)["difference"].dropna().to_dict()


# ---------------------------------------------------------------- statistics by hand


def test_a_paired_difference_by_hand():
    found = statistics.paired(pd.Series([1.0, 2.0, 3.0]))
    half = 4.302653 / 3**0.5  # t(0.975, 2), standard error 1 / sqrt(3)
    assert [found["difference_low"], found["difference_high"]] == pytest.approx(
        [2 - half, 2 + half]
    )
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)  # two-sided, t = 3.4641
    assert found["pairs"] == 3 and found["difference_se"] == pytest.approx(3**-0.5)
    for lonely in (
        statistics.paired(pd.Series([1.0])),
        statistics.paired(pd.Series([1.0, 2]), False),
    ):
        nothing = {key for key, value in lonely.items() if math.isnan(value)}
        assert nothing == set(found) - {"difference", "pairs"}
    assert [statistics.paired(pd.Series([d, d]))["p"] for d in (0.0, 1.0)] == [1, 0]


def test_the_detectable_difference_is_found_in_four_of_five_experiments():
    draws = np.random.default_rng(0).normal(size=(4000, 4))
    effect = statistics.paired(pd.Series([-1.0, -1.0, 1.0, 1.0]))["detectable"] * 0.75**0.5
    lows = [statistics.paired(pd.Series(row))["difference_low"] for row in draws[:400] + effect]
    assert 0.74 < np.mean(np.array(lows) > 0) < 0.86


def test_holm_by_hand():
    p = pd.Series({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan, "e": 0.9})
    expected = {"a": 0.04, "b": 0.09, "c": 0.09, "e": 0.9}  # 4 x 0.01, 3 x 0.03, 2 x 0.04 is less
    assert statistics.holm(p).dropna().to_dict() == pytest.approx(expected)


def test_the_interval_of_a_share_of_images():
    assert statistics.wilson(100, 60) == pytest.approx((93.98, 100), abs=0.01)
    assert statistics.wilson(50, 100) == pytest.approx((40.38, 59.62), abs=0.01)


def test_the_interval_of_a_ratio():
    interval = statistics.ratio_interval
    # With a denominator that never varies it is the interval of the numerator, divided.
    numerators, constant = pd.Series([1.0, 2.0, 3.0]), pd.Series([4.0, 4.0, 4.0])
    row = statistics.paired(numerators)
    expected = [row["difference_low"] / 4, row["difference_high"] / 4]
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
    # t(0.975, 1) = 12.706; noncentral t with noncentrality 16.33 exceeds it in 80% of cases.
    text = results.render(frame(*rows))
    assert "91.00 ± 1.41" in text and "+4.00 [-8.7, 16.7] (33%; 16.3)" in text


# ---------------------------------------------------------------- what is compared with what


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
    columns = ["baseline", "difference", "gap_closed"]
    assert table.loc["permuted [adamw]", columns].tolist() == ["naive [adamw]", 4, 25]
    assert table.loc["permuted", columns].tolist() == ["naive", 5, 25]
    alone = [*plain, tagged[2]]  # no naive run of its tag
    row = summary(*alone).loc["permuted [adamw]"]
    assert row[columns].tolist() == ["naive", -10, -50]
    text = results.render(frame(*alone))
    assert "compared with naive: LTH, permuted, permuted [adamw]" in text
    # Other settings are no comparison.
    other = tagged[2] | {"settings": {"lr": "0.1"}}
    row = summary(*(one | {"settings": {"lr": "0.2"}} for one in plain), other)
    assert row.loc["permuted [adamw]", columns].isna().all()
    assert "compared with naive [adamw]: LTH [adamw]" in results.render(frame(*plain, *tagged))


def test_overall_averages_each_pair_over_the_cells_that_have_every_arm():
    levels = (("lth", 90), ("naive", 70), ("permuted", 75))
    rows = [
        run(arm, seed, seed + (arm != "lth"), level + 10 * k + seed, rewind=k)
        for seed in (0, 2)
        for k in (0, 1)
        for arm, level in levels
    ]
    runs = frame(*rows, run("naive", 0, 1, 5, rewind=2))
    table = statistics.summary(runs).query("sparsity.isna()").set_index("variant")
    assert table.loc["naive", "mean"] == pytest.approx(70 + 5 + 1)
    assert table.loc["permuted", ["difference", "difference_se"]].tolist() == [5, 0]
    wide = frame(*rows, *(row | {"width": 4.0, "dense_epochs": 20} for row in rows))
    assert statistics.summary(wide).query("sparsity.isna()")["width"].tolist() == 3 * [1] + 3 * [4]


def test_without_a_gap_there_is_no_share_of_it():
    rows = [run("lth", s, s, 70.0 - s) for s in (0, 2)]
    behind = summary(*rows, *(run("naive", s, s + 1, 80.0) for s in (0, 2)))
    assert behind.loc["lth", ["gap_closed", "gap_low", "gap_high"]].isna().all()


def test_the_look_of_a_tagged_variant():
    looks = style.looks(["permuted [b]", "permuted", "lth [b]", "permuted [c]", "IMP"])
    assert list(looks) == ["lth [b]", "permuted", "permuted [b]", "permuted [c]", "IMP"]
    assert looks["lth [b]"]["label"] == "LTH [b]" and looks["IMP"]["label"] == "IMP"
    permuted = [looks[name] for name in list(looks)[1:4]]
    assert len({(look["color"], look["marker"]) for look in permuted}) == 1
    assert len({look["linestyle"] for look in permuted}) == 3


# ---------------------------------------------------------------- what the tables say


def test_tables_say_when_runs_were_made_by_different_code():
    rows = [run("lth", 0, 0, 90.0), run("lth", 2, 2, 91.0)]
    other = run("naive", 0, 1, 70.0, code="abc+def")
    assert "different code" not in results.render(frame(*rows))
    assert "different code: abc (2 runs), abc+def (1 runs)" in results.render(frame(*rows, other))
    masks = [run("lth", 4, 4, 80.0, mask_code="n"), run("lth", 6, 6, 80.0, mask_code="o", tag="t")]
    text = results.render(frame(*rows, *masks))
    assert "masks were pruned by different code: m (2 runs), n (1 runs), o (1 runs)" in text
    assert "pruned by different" not in results.render(frame(*rows, masks[1]))
    elsewhere = run("naive", 0, 1, 70.0, code="ghi", model="n")  # is compared with none of these
    assert "different code" not in results.render(frame(*rows, elsewhere))


@pytest.mark.parametrize("pairs", [((0, 1), (0, 3), (0, 5)), ((0, 1), (2, 1)), ((0, 1), (1, 2))])
def test_pairs_that_share_a_network_have_no_interval_and_a_line_says_so(pairs):
    uncertain = ["difference_low", "difference_se", "p", "p_holm", "detectable", "gap_low"]
    found = summary(*grid(pairs)).loc["permuted"]
    assert found["difference"] == pytest.approx(10) and found[uncertain].isna().all()
    assert summary(*grid()).loc["permuted", uncertain].notna().all()
    text = results.render(frame(*grid(pairs)))
    assert "share networks" in text and "cannot be told from these runs: +10.0 points" in text
    assert not any(word in text for word in ("*", "[", "95%", "Holm", "80%"))
    assert "share networks" not in results.render(frame(*grid()))


def test_stars_and_findings_say_what_the_intervals_say():
    def text(low, high, middle=None):
        gains = (low, (low + high) / 2 if middle is None else middle, high)
        rows = [run("naive", a, b, 70.0) for a, b in PAIRS]
        rows += [run("permuted", a, b, 70 + gain) for (a, b), gain in zip(PAIRS, gains)]
        runs = frame(*rows, *(run("lth", a, a, 90.0 + a / 10) for a, _ in PAIRS))
        return results.render(runs).replace("\n", " ")

    assert "+5.00 [4.8, 5.2]** (25%; 0.3)" in text(4.9, 5.1) and "mask helps: +5.0" in text(
        4.9, 5.1
    )
    assert "25% [24.1, 25.4] of the gap" in text(4.9, 5.1)
    assert "mask hurts: -5.0 points" in text(-5.1, -4.9)
    assert "Holm's correction for the 2 differences" in text(4.9, 5.1)
    assert "cannot be told from these runs: -1.0 points" in text(-3, 1)
    nothing = text(-1, 3)
    assert (
        "cannot be told from these runs: +1.0 points" in nothing
        and "interval [-4.0, 6.0]" in nothing
    )
    assert "so many can show a difference of 6.5 points" in nothing and "helps:" not in nothing


def test_one_seed_has_no_spread_and_a_missing_arm_no_difference():
    one = results.render(frame(run("lth", 0, 0, 90.0), run("naive", 0, 1, 80.0)))
    assert "nan" not in one and "90.00 ±" not in one and "interval" not in one
    assert "90.00" in one and "+10.00 (100%)" in one
    assert "nan" not in results.render(frame(run("lth", 0, 0, 90.0)))


# ---------------------------------------------------------------- folders of runs


def edit(folder, pattern="*", part="arguments", **values):
    """Change what the results of some runs hold of themselves, or of the part `dense` or `imp`."""
    for path in folder.rglob(f"{pattern}/result.json"):
        result = json.loads(path.read_text())
        (result[part] if part else result).update(values)
        path.write_text(json.dumps(result))


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


TRAINED = "epochs lr schedule warmup weight_decay batch_size momentum precision"


@pytest.mark.parametrize(
    "part, keys",
    [
        ("arguments", TRAINED),
        ("dense", f"{TRAINED} limit_train image_size data_dir checksum"),
        ("imp", f"{TRAINED} rewind one_shot"),
        ("align", "match_images restarts"),
    ],
)
def test_runs_of_two_settings_have_columns_of_their_own(part, keys):
    for key in keys.split():
        made = {name: {"precision": None} for name in ("arguments", "dense", "imp", "align")}
        other = made | {part: {key: "other"}}
        if (part, key) == ("arguments", "precision"):  # that was used counts, not that asked for
            other = made | {key: "other"}
        rows = grid(PAIRS[:1], settings=finished.settings(made))
        table = frame(*rows, *grid(PAIRS[1:], settings=finished.settings(other)))
        name = {"data_dir": "data", "checksum": "data"}.get(key, key)
        expected = f"{part} {name}=other".removeprefix("arguments ")
        assert finished.with_settings(table).tolist().count(expected) == 6, key
    # A place of its own is no other data.
    moved = {"arguments": {}, "dense": {"checksum": "c", "data_dir": "elsewhere"}}
    here = {"arguments": {}, "dense": {"checksum": "c", "data_dir": "here"}}
    assert finished.settings(moved) == finished.settings(here)


def test_a_sceptical_referee_accepts_what_is_printed(runs, tmp_path):
    """A mixed run, an ensemble, an early match, a tag and another machine's precision together."""
    for name, arm in (("plain", ""), ("tagged", "permuted"), ("early", "permuted"), ("shared", "")):
        shutil.copytree(runs / "sparse" / arm, tmp_path / name / arm)
    edit(tmp_path / "tagged", tag="adamw")
    edit(tmp_path / "early", match_epoch=1)
    edit(tmp_path / "plain/naive/seed2-seed3", "s0.70_k001", lr=0.5)
    edit(tmp_path / "plain/lth/seed2-seed2", part="", precision="bf16")
    edit(tmp_path / "shared", width=4.0)
    edit(tmp_path / "shared", "seed2-*/*", source_seed=0)
    edit(tmp_path / "shared/lth/seed2-seed2", target_seed=0)  # another order of the images
    narrow, wide = succeed("analyze.results", tmp_path).split("mlp x4 on glyphs\n")
    used = "lr=0.02 precision=fp32"
    for label in ("LTH", "naive", "permuted", "permuted @1"):
        assert f"{label} [{used}]" in narrow  # never named without its settings
    assert "naive [lr=0.5 precision=fp32]" in narrow and "LTH [lr=0.02 precision=bf16]" in narrow
    table = pd.read_csv(tmp_path / "summary.csv").query("width < 1").dropna(subset="difference")
    assert set(table["baseline"]) == {f"naive [{used}]"}  # and only what differs in the arm alone
    assert set(table["variant"]) == {
        f"{arm} [{used}]" for arm in ("lth", "permuted", "permuted @1")
    }
    assert (table["pairs"] <= 2).all() and "compared with naive [lr=0.02" in narrow
    assert "share networks (seed 0)" in wide and "[" not in wide.split("mlp x0.03")[0]
    assert table["p_holm"].dropna().ge(table["p"].dropna()).all()
    told = set(pd.read_csv(tmp_path / "results.csv")["tag"])
    assert told >= {"adamw", used, "lr=0.5 precision=fp32"}


def test_a_match_to_an_early_epoch_is_named_though_no_later_one_is_there(runs, ends, tmp_path):
    shutil.copytree(runs / "sparse/naive/seed0-seed1", tmp_path / "R/naive")
    succeed(*stage3(*ends, tmp_path / "align", "--target-epoch", 1))
    succeed(*stage4("permuted", ends[1], tmp_path / "align", tmp_path / "R/permuted"))
    assert "permuted @1" in succeed("analyze.results", tmp_path / "R")


def test_runs_that_repeat_others_are_refused_unless_a_tag_tells_them_apart(runs, tmp_path):
    shutil.copytree(runs / "sparse", tmp_path / "one")
    shutil.copytree(runs / "sparse/lth", tmp_path / "two")
    refused(call("analyze.results", tmp_path), "8 runs", "--tag")
    edit(tmp_path / "two", tag="adamw")
    assert "LTH [adamw]" in succeed("analyze.results", tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["tag"].value_counts().to_dict() == {"adamw": 8}


@pytest.mark.parametrize("module", ["results", "accuracy", "interpolation"])
def test_an_empty_folder_is_one_line(tmp_path, module):
    for root, words in ((tmp_path, "no finished"), (tmp_path / "nowhere", "no such folder")):
        outcome = call(f"analyze.{module}", root)
        assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1
