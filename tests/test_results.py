"""The table of the runs below a folder, its statistics, and the output of analyze.results."""

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from analyze import results
from analyze.lib import runs as finished
from analyze.lib import statistics
from tests.conftest import call, edit, refused, result, succeed

PAIRS = ((0, 1), (2, 3), (4, 5))
DEFAULTS = {"model": "m", "width": 1.0, "dataset": "d", "mask_dataset": "d", "sparsity": 0.9}
DEFAULTS |= {"rewind": 0, "match_epoch": math.nan, "method": "activation", "signs": False}
DEFAULTS |= {"fan_in": False, "code": "abc", "mask_code": "m", "dense_epochs": 200, "tag": ""}
DEFAULTS |= {"diverged": None, "path": "somewhere", "sparsity_total": 0.9}


def make_rows(text, **values):
    """Return runs that are described as "arm source target accuracy", separated by commas."""
    rows = []
    for arm, source, target, accuracy in map(str.split, text.split(", ")):
        seeds = {"source_seed": int(source), "target_seed": int(target)}
        rows.append(DEFAULTS | {"arm": arm, "test_acc": float(accuracy)} | seeds | values)
    return rows


def make_grid(pairs=PAIRS, gains=(9, 10, 11), **values):
    """Return runs of three arms for every pair; permuting gains these points over naive."""
    text = [
        f"lth {a} {a} {90 + a / 10}, naive {a} {b} 70, permuted {a} {b} {70 + gain}"
        for (a, b), gain in zip(pairs, gains)
    ]
    return make_rows(", ".join(text), **values)


def frame(rows):
    table = pd.DataFrame(rows)
    return table.assign(variant=finished.variant_names(table))


def summary(rows):
    return statistics.summary(frame(rows)).query("sparsity.notna()").set_index("variant")


def differences(table):
    return table["difference"].dropna().to_dict()


def render(rows, *against):
    return results.render(frame(rows), *against)


# ---------------------------------------------------------------- statistics by hand


def test_a_paired_difference_by_hand():
    test = statistics.paired_test(pd.Series([1.0, 2.0, 3.0]))
    error = 3**-0.5
    half = 4.302653 * error  # t(0.975, 2)
    # The noncentral t exceeds t(0.975, 2) with a probability of 80%.
    assert stats.nct.sf(4.302653, 2, test.pop("detectable") / error) == pytest.approx(0.8)
    # Two-sided, t = 3.4641.
    expected = [2, error, 2 - half, 2 + half, 0.074180, 3]
    assert [*test.values()] == pytest.approx(expected, abs=1e-5)
    for arguments in ((pd.Series([1.0]),), (pd.Series([1.0, 2]), False)):
        test = statistics.paired_test(*arguments)
        assert {key for key in test if not math.isnan(test[key])} == {"difference", "pairs"}
    # Equal by chance, as accuracies on 1000 images can be.
    for pair in ((0.0, 0.0), (-0.5, -0.5), (9.5 - 10, 9.4 - 9.9)):
        test = statistics.paired_test(pd.Series(pair))
        assert test["difference"] == pair[0] and math.isnan(test["p"] + test["difference_low"])


def test_holm_by_hand():
    p = pd.Series({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan, "e": 0.9})
    expected = {"a": 0.04, "b": 0.09, "c": 0.09, "e": 0.9}  # 4 x 0.01, 3 x 0.03, 2 x 0.04 is less
    assert statistics.holm(p).dropna().to_dict() == pytest.approx(expected)


def test_the_interval_of_a_ratio():
    """At its bounds the t test of numerator - ratio * denominator has p = 5% (Fieller)."""
    numerators, denominators = pd.Series([4.0, 5.0, 6.5]), pd.Series([10.0, 12.0, 12.5])
    low, high = statistics.ratio_interval(numerators, denominators)
    assert low < 15.5 / 34.5 < high
    for ratio in (low, high):
        p = statistics.paired_test(numerators - ratio * denominators)["p"]
        assert p == pytest.approx(0.05)
    near_zero, single = pd.Series([-5.0, 1.0, 5.0]), pd.Series([1.0])
    assert math.isnan(statistics.ratio_interval(numerators, near_zero)[0])
    assert math.isnan(statistics.ratio_interval(single, 2 * single)[0])
    assert statistics.ratio_interval(near_zero, pd.Series(3 * [4.0]))[1] > 0  # constant


def test_summary_by_hand():
    others = make_rows("naive 0 1 80, permuted 0 1 83, naive 2 3 78, permuted 2 3 83")
    rows = others + make_rows("lth 0 0 90, lth 2 2 92")
    table = summary(rows)
    assert table.loc["LTH", ["mean", "std", "gap_closed"]].tolist() == [91, 2**0.5, 100]
    row = table.loc["permuted", ["difference", "difference_se", "pairs", "gap_closed"]]
    assert row.tolist() == pytest.approx([4, 1, 2, 100 * 4 / 12])  # of 3 and 5
    # t(0.975, 1) = 12.706; noncentral t with noncentrality 16.33 exceeds it in 80% of cases.
    assert "91.00 ± 1.41" in render(rows) and "+4.00 [-8.7, 16.7] (33%; 16.3)" in render(rows)
    # LTH is worse than naive: there is no gap.
    no_gap = summary(others + make_rows("lth 0 0 70, lth 2 2 68")).loc["permuted"]
    assert no_gap[["gap_closed", "gap_low", "gap_high"]].isna().all()


# ---------------------------------------------------------------- which runs are compared


def test_variants_are_separate_and_paired_by_their_seeds():
    rows = make_rows("lth 0 0 90, imp-target 1 1 91, imp-target 5 5 50")
    rows += make_rows("naive 0 1 80, naive 0 3 70, permuted 0 1 83")
    rows += make_rows("permuted 0 1 84", method="masked") + make_rows("permuted 0 1 88", signs=True)
    table = summary(rows)
    expected = {"LTH": 15, "imp-target": 11, "permuted": 3}  # LTH is in two pairs
    expected |= {"permuted (masked)": 4, "permuted + signs": 8}
    assert differences(table) == expected and set(table.index) == {"naive", *expected}
    assert table.loc["naive", ["mean", "count"]].tolist() == [75, 2]
    # One run in two pairs.
    assert table.loc["LTH", ["count", "pairs"]].tolist() == [1, 2]
    assert pd.isna(table.loc["LTH", "std"])


def test_early_matches_and_masks_of_another_data_set_are_variants_of_their_own():
    rows = make_rows("naive 0 1 50") + make_rows("permuted 0 1 51", match_epoch=200)
    early = make_rows("permuted 0 1 48", match_epoch=5)
    foreign = make_rows("naive 0 1 60, permuted 0 1 64", mask_dataset="e")
    # Each data set of the mask has its own naive runs.
    expected = {"permuted": 1.0, "permuted @5": -2.0, "permuted [e mask]": 4.0}
    assert differences(summary(rows + early + foreign)) == expected
    assert [*frame(early)["variant"]] == ["permuted @5"]  # also without a later match
    # The same seed is another network on another data set: these two are a pair.
    same = make_rows("naive 0 0 60, permuted 0 0 64", mask_dataset="e")
    assert differences(summary(same)) == {"permuted [e mask]": 4.0}


def test_a_tagged_variant_is_compared_with_the_naive_runs_of_its_tag():
    untagged = make_rows("lth 0 0 90, naive 0 1 70, permuted 0 1 75")
    tagged = make_rows("lth 0 0 72, naive 0 1 56, permuted 0 1 60", tag="adamw")
    columns, table = ["difference", "gap_closed"], summary(untagged + tagged)
    assert table.loc["permuted [adamw]", columns].tolist() == [4, 25]
    assert table.loc["permuted", columns].tolist() == [5, 25] and len(table) == 6
    assert "minus naive of the same tag, in points" in render(untagged + tagged)
    assert "of the same tag" not in render(untagged)
    without_naive = untagged + tagged[2:]
    assert summary(without_naive).loc["permuted [adamw]", columns].isna().all()
    against = statistics.summary(frame(without_naive), "naive").set_index("variant")
    assert against.loc["permuted [adamw]", "difference"] == -10


def test_overall_averages_each_pair_over_the_cells_that_have_every_arm():
    # The last pair has only one arm.
    rows = make_grid() + make_grid(gains=(11, 14, 11), rewind=1) + make_rows("naive 6 7 5")
    # A cell with one arm, and an arm in one cell.
    one_arm = make_rows("naive 0 1 5", rewind=2) + make_rows("shuffled 0 1 9", rewind=1)
    one_cell = make_rows("shuffled 0 1 9, shuffled 2 3 9, shuffled 4 5 9", rewind=1)
    for extra in (one_arm, one_cell):
        table = statistics.summary(frame(rows + extra)).query("sparsity.isna()")
        table = table.set_index("variant")
        assert table["mean"].to_dict() == pytest.approx({"LTH": 90.2, "naive": 70, "permuted": 81})
        row = table.loc["permuted", ["difference", "difference_se"]]
        assert row.tolist() == pytest.approx([11, 3**-0.5])  # of 10, 12 and 11
        assert "(permuted, all; pairs of networks: 3)" in render(rows + extra).replace("\n", " ")
    # A pair that is not in every cell yet is left out.
    later = make_grid() + make_grid(PAIRS[:2], gains=(11, 14), rewind=1)
    table = statistics.summary(frame(later)).query("sparsity.isna()").set_index("variant")
    assert table.loc["permuted", ["difference", "pairs"]].tolist() == [11, 2]
    assert "over 2 to 3 pairs" in render(later) and "over 2" not in render(make_grid())
    wide = rows + [row | {"width": 4.0, "dense_epochs": 20} for row in rows]
    assert statistics.summary(frame(wide)).query("sparsity.isna()")["width"].tolist() == (
        3 * [1] + 3 * [4]
    )


def test_the_finding_is_about_the_permutation_alone():
    other = make_grid(gains=(30, 30, 31), signs=True) + make_grid(
        gains=(0, 1, 0), method="identity"
    )
    text = statistics.findings(statistics.summary(frame(make_grid(gains=(-3, -1, 1)) + other)))
    assert "cannot be told" in text[0] and "-1.0 points" in text[0]
    assert "no permuted mask" in render(other)


def test_differences_to_another_variant():
    table = statistics.summary(frame(make_grid()), "permuted").set_index("variant")
    assert table.loc["naive", "difference"] == -10 and table["gap_closed"].isna().all()
    assert table.loc["LTH", "difference"] == pytest.approx(10.2)
    assert pd.isna(table.loc["permuted", "difference"])
    assert "minus permuted, in points" in render(make_grid(), "permuted")
    assert "of the gap" not in render(make_grid(), "permuted")


# ---------------------------------------------------------------- output


def test_tables_note_runs_by_different_code():
    rows = make_rows("lth 0 0 90, lth 2 2 91")
    edited = make_rows("lth 6 6 80", code="jkl", mask_code="o", tag="t")
    elsewhere = make_rows("naive 0 1 70", code="ghi", model="n")  # in a table of its own
    for extra in ([], elsewhere, edited):
        assert " by different code" not in render(rows + extra)
    text = render(rows + make_rows("naive 0 1 70", code="abc+def"))
    assert "different code: abc (LTH), abc+def (naive)" in text
    text = render(rows + make_rows("lth 4 4 80", mask_code=None))
    assert "masks were pruned by different code: m (LTH), unknown (LTH)" in text
    text = render(rows + make_rows("lth 4 4 80", mask_code="n") + edited)
    assert "masks were pruned by different code: m (LTH), n (LTH), o (LTH [t])" in text


def test_tables_note_a_sparsity_over_different_layers():
    rows = make_rows("lth 0 0 90, naive 0 1 70")
    wide = [row | {"width": 4.0, "sparsity_total": 0.7} for row in rows]
    assert finished.caveats(frame(rows + wide)) == []
    text = render(rows + make_rows("lth 2 2 60", tag="t", sparsity_total=0.512))
    assert "at 0.9 other layers are pruned, of all weights 51.2% (LTH [t]), 90.0% (LTH," in text


SHARING = (((0, 1), (0, 3), (0, 5)), ((0, 1), (2, 1), (4, 5)), ((0, 1), (1, 2), (4, 5)))


@pytest.mark.parametrize("pairs", SHARING)
def test_pairs_that_share_a_network_have_no_interval_and_a_note(pairs):
    columns = ["difference_low", "difference_se", "p", "p_holm", "detectable", "gap_low"]
    row = summary(make_grid(pairs)).loc["permuted"]
    assert row["difference"] == 10 and row[columns].isna().all()
    assert summary(make_grid()).loc["permuted", columns].notna().all()
    text = render(make_grid(pairs))
    assert "share networks" in text and "cannot be told from these runs: +10.0 points" in text
    assert not any(word in text for word in ("*", "[", "95%", "Holm", "80%"))
    other = make_grid(((0, 3), (2, 5), (4, 1)), tag="t")
    assert "share networks" not in render(make_grid() + other)


@pytest.mark.parametrize(
    "gains, expected",
    [
        ((4.9, 5.0, 5.1), "+5.00 [4.8, 5.2]** (25%; 0.3)|mask helps: +5.0|25% [24.1, 25.4] of the"),
        ((-5.1, -5.0, -4.9), "mask hurts: -5.0|Holm's correction for the 2 differences"),
        ((-3, -1, 1), "cannot be told from these runs: -1.0 points"),
        ((-1, 1, 3), "cannot be told from these runs: +1.0|interval [-4.0, 6.0]|difference of 6.5"),
    ],
)
def test_stars_and_findings_agree_with_the_intervals(gains, expected):
    text = render(make_grid(gains=gains)).replace("\n", " ")
    assert all(part in text for part in expected.split("|"))


def test_one_seed_has_no_spread_and_a_missing_arm_no_difference():
    text = render(make_rows("lth 0 0 90, naive 0 1 80"))
    assert "nan" not in text and "90.00 ±" not in text and "interval" not in text
    assert "90.00" in text and "+10.00 (100%)" in text
    assert "nan" not in render(make_rows("lth 0 0 90"))


def test_gains_are_drawn_with_their_intervals():
    rows = (
        statistics.summary(frame(make_grid())).assign(cell="90%, k=5").dropna(subset="difference")
    )
    (axis,) = results.plot(rows, "title").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["LTH", "permuted"]
    bounds = [bar.get_segments()[0][:, 0].tolist() for bar in axis.collections]
    expected = rows.sort_values("variant")[["difference_low", "difference_high"]]
    assert bounds == [pytest.approx(row) for row in expected.to_numpy().tolist()]


# ---------------------------------------------------------------- settings and folders of runs

TRAINING = "epochs lr schedule warmup weight_decay batch_size momentum precision"


@pytest.mark.parametrize(
    "section, keys",
    [
        ("arguments", TRAINING),
        ("dense", f"{TRAINING} limit_train image_size checksum"),
        ("imp", f"{TRAINING} rewind one_shot"),
        ("arguments", "added_later"),
        ("align", "match_images restarts"),
    ],
)
def test_runs_of_two_settings_have_columns_of_their_own(section, keys):
    settings = {f"{name}.seed": 0 for name in finished.SECTIONS}
    for key in keys.split():
        other = settings | {f"{section}.{key}": "other"}
        rows = make_rows("permuted 0 1 90", **settings) + make_rows("permuted 2 3 90", **other)
        column = "method" if section == "align" else "tag"
        prefix = {"align": "activation ", "arguments": ""}.get(section, f"{section} ")
        expected = [f"{prefix}{key}={value}" for value in ("None", "other")]
        assert [*finished.with_settings(frame(rows))[column]] == expected


def test_alignment_settings_are_added_to_the_method_and_compared_with_the_same_naive():
    rows = make_rows("naive 0 1 70") + make_rows("permuted 0 1 80", **{"align.seed": 0})
    # A flag of one method is not a setting of the others.
    rows += make_rows("permuted 0 1 81", method="weight", **{"align.restarts": 5})
    assert [*finished.with_settings(frame(rows))["method"][1:]] == ["activation", "weight"]
    rows += make_rows("permuted 0 1 82", method="weight", **{"align.restarts": 2})
    runs = finished.with_settings(frame(rows))
    assert runs["tag"].eq("").all()
    expected = {f"permuted (weight restarts={count})": gain for count, gain in ((5, 11), (2, 12))}
    assert differences(summary(runs)) == expected | {"permuted": 10}


@pytest.mark.parametrize("value, tags", [(False, {""}), (True, {"mixup=False", "mixup=True"})])
def test_a_flag_that_was_added_later_was_off_before(value, tags):
    settings = [{"arguments.seed": 0}, {"arguments.mixup": value}]
    rows = [make_rows("lth 0 0 90", **entry)[0] for entry in settings]
    assert {*finished.with_settings(frame(rows))["tag"]} == tags


def test_another_data_dir_is_no_other_setting():
    rows = [make_rows("lth 0 0 90", **{"dense.data_dir": path})[0] for path in ("here", "there")]
    assert finished.with_settings(frame(rows))["tag"].eq("").all()


def test_results_lists_every_finished_run_once(runs, tmp_path):
    """Runs are found by result.json, whatever their folders are called."""
    shutil.copytree(runs / "sparse", tmp_path / "somewhere/else")
    (tmp_path / "somewhere/else/lth/seed0-seed0/s0.50_k000/result.json").unlink()  # unfinished
    refused(call("analyze.results", tmp_path, "--against nothing"), "give one of LTH, naive, perm")
    assert "minus LTH" in succeed("analyze.results", tmp_path, "--against LTH")
    out = succeed("analyze.results", tmp_path)
    assert "50%" in out and "minus naive" in out and "by other code" not in out
    drawn = pd.read_csv(tmp_path / "figures/gains_mlpx0.03125_glyphs.csv")
    assert drawn["cell"].nunique() == 4 and set(drawn["variant"]) == {"LTH", "permuted"}
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table) == finished.COLUMNS and len(table) == 2 * 3 * 4 - 1
    assert table["tag"].isna().all() and set(table["arm"]) == {"lth", "naive", "permuted"}
    # An integer, though naive runs have none.
    assert ",activation,3," in (tmp_path / "results.csv").read_text()
    assert table.loc[table["arm"] != "permuted", ["method", "match_epoch"]].isna().all(axis=None)
    row = table.iloc[0]
    run = result(Path(row["path"]))
    expected = [run["test_acc"], run["code"], "fp32", 3]
    assert row[["test_acc", "code", "precision", "epochs"]].tolist() == expected


def test_runs_of_different_settings_tags_and_precisions_are_never_mixed(runs, tmp_path):
    shutil.copytree(runs / "sparse", tmp_path / "untagged")
    shutil.copytree(runs / "sparse/permuted", tmp_path / "tagged")
    edit(tmp_path / "tagged", tag="adamw")
    edit(tmp_path / "untagged/naive/seed2-seed3", "s0.70_k001", lr=0.5)
    edit(tmp_path / "untagged/lth/seed2-seed2", precision="bf16")
    edit(tmp_path / "untagged/lth", mask_code="abc")
    text, default = succeed("analyze.results", tmp_path), "lr=0.02 precision=fp32"
    assert "8 runs' masks are by other code than prune_imp.py and common/ are now" in text
    for label in ("LTH", "naive", "permuted"):
        assert f"{label} [{default}]" in text  # never named without its settings
    assert "naive [lr=0.5 precision=fp32]" in text and "LTH [lr=0.02 precision=bf16]" in text
    table = pd.read_csv(tmp_path / "summary.csv").dropna(subset="difference")
    # Only variants that differ from naive in nothing but the arm.
    assert set(table["variant"]) == {f"LTH [{default}]", f"permuted [{default}]"}
    assert (table["pairs"] <= 2).all()
    assert table["p_holm"].dropna().ge(table["p"].dropna()).all()
    tags = set(pd.read_csv(tmp_path / "results.csv")["tag"])
    assert tags == {"adamw", default, "lr=0.5 precision=fp32", "lr=0.02 precision=bf16"}


def test_duplicate_runs_are_refused_unless_they_have_another_tag(runs, tmp_path):
    shutil.copytree(runs / "sparse", tmp_path / "a")
    shutil.copytree(runs / "sparse/lth", tmp_path / "b")
    duplicates = (f"{tmp_path}/{name}/seed0-seed0/s0.50_k000" for name in ("a/lth", "b"))
    refused(call("analyze.results", tmp_path), *duplicates, "8 such groups", "--tag")
    edit(tmp_path / "b", tag="adamw")
    assert "LTH [adamw]" in succeed("analyze.results", tmp_path)
    assert pd.read_csv(tmp_path / "results.csv")["tag"].value_counts().to_dict() == {"adamw": 8}


@pytest.mark.parametrize("module", ["results", "accuracy", "interpolation"])
def test_an_empty_folder_is_refused_in_one_line(tmp_path, module):
    refused(call(f"analyze.{module}", tmp_path), "no finished")
    refused(call(f"analyze.{module}", tmp_path / "nowhere"), "no such folder")


def test_gains_of_many_cells_are_drawn_below_each_other():
    rows = statistics.summary(frame([row for k in range(12) for row in make_grid(rewind=k)]))
    figure = results.plot(rows.dropna(subset=["difference", "sparsity"]), "title")
    assert len(figure.axes) == 12 and figure.get_size_inches().max() < 20


def test_nearly_equal_sparsities_are_different_cells():
    text = render(make_grid(sparsity=0.99999) + make_grid(sparsity=0.999991))
    assert "99.999%, k=0" in text and "99.9991%, k=0" in text and "100%, k" not in text


def test_the_gap_is_to_the_network_of_the_mask_and_of_the_same_pairs_as_the_gain():
    foreign = make_rows("naive 0 1 60, permuted 0 1 64", mask_dataset="e")
    row = summary(make_rows("lth 0 0 90") + foreign).loc["permuted [e mask]"]
    assert row["difference"] == 4 and pd.isna(row["gap_closed"])  # LTH has another mask
    row = summary(make_grid() + make_rows("naive 6 7 1, permuted 6 7 99")).loc["permuted"]
    assert row["pairs"] == 4 and pd.isna(row["gap_closed"])  # the last pair has no LTH
