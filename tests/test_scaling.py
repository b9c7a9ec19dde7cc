"""The share of the gap against width and training length."""

import shutil

import pandas as pd
import pytest
from scipy import stats

from analyze import scaling
from tests.conftest import call, edit, refused, succeed
from tests.test_results import PAIRS, frame, make_grid, make_rows


def rows_of(x, *rows):
    return scaling.scaling(pd.concat(map(scaling.permuted_shares, map(frame, rows))), x)


def test_shares_and_slopes_by_hand():
    # LTH of seeds 0, 2 and 4 is 90.0, 90.2 and 90.4, naive 70: the gap is 20.0, 20.2 and 20.4.
    narrow, wide = make_grid(gains=(8, 9, 10), width=1.0), make_grid(gains=(12, 15, 10), width=4.0)
    table = rows_of("width", narrow + wide)
    assert [*table["width"]] == [1, 4] and [*table["count"]] == [3, 3]
    assert [*table["gap_closed"]] == pytest.approx([100 * 27 / 60.6, 100 * 37 / 60.6])
    # From width 1 to 4 it doubles twice.
    slopes = [100 * 4 / 20 / 2, 100 * 6 / 20.2 / 2, 0]
    test = stats.ttest_1samp(slopes, 0)
    for _, row in table.iterrows():
        assert row["difference"] == pytest.approx(sum(slopes) / 3) and row["pairs"] == 3
        assert row["p"] == row["p_holm"] == pytest.approx(test.pvalue)
        assert row["difference_high"] == pytest.approx(test.confidence_interval().high)


def test_a_slope_is_over_the_pairs_with_a_gap_at_every_width():
    narrow = make_grid(PAIRS[1:], gains=(9, 10), width=1.0)
    wide = make_grid(gains=(2, 11, 12), width=2.0)
    table = rows_of("width", narrow + wide)
    assert [*table["count"]] == [2, 3] and (table["pairs"] == 2).all()
    assert table["difference"].iloc[0] == pytest.approx((2 / 20.2 + 2 / 20.4) / 2 * 100)
    narrow[:2] = make_rows("lth 2 2 69, naive 2 3 70", width=1.0)  # no gap
    assert (rows_of("width", narrow + wide)["pairs"] == 1).all()
    narrow[3:5] = make_rows("lth 4 4 69, naive 4 5 70", width=1.0)
    assert rows_of("width", narrow + wide)["difference"].isna().all()


def test_lengths_are_compared_at_equal_k_and_at_equal_fractions_of_length():
    start, early = make_grid(dense_epochs=20), make_grid(rewind=5, dense_epochs=20)
    late = make_grid(gains=(1, 2, 3), rewind=10, dense_epochs=40)
    long = make_grid(dense_epochs=40) + make_grid(rewind=5, dense_epochs=40) + late
    table = rows_of("T", start + early, long, make_grid(rewind=3, dense_epochs=80))
    shares = table.set_index(["k", "T"])["gap_closed"].round(1).to_dict()
    same = {(k, T): 49.5 for k in ("k=0", "k=5") for T in (20, 40)}
    assert shares == same | {("k=0.25T", 20): 49.5, ("k=0.25T", 40): 9.9}
    assert rows_of("width", early).empty


def test_holm_is_over_the_slopes_not_over_the_rows():
    grids = [
        make_grid(gains=gains, width=width, rewind=k)
        for k, gains in ((0, (9, 10, 12)), (1, (8, 9, 10.5)))
        for width in (1.0, 2.0, 4.0)
        for gains in [[gain * width**0.1 + (width == 2) * gains.index(gain) for gain in gains]]
    ]
    table = rows_of("width", sum(grids, []))
    p = table.drop_duplicates("k")["p"]
    assert p.nunique() == 2 and table["p_holm"].max() == pytest.approx(max(2 * p.min(), p.max()))


def test_pairs_that_share_a_network_have_no_interval():
    pairs = ((0, 1), (0, 3), (0, 5))
    rows = make_grid(pairs, width=1.0) + make_grid(pairs, gains=(12, 14, 13), width=2.0)
    table = rows_of("width", rows)
    assert table["difference"].notna().all() and table[["p", "gap_low"]].isna().all(axis=None)
    text = scaling.render(table, "width")
    assert "(3 pairs)" in text and "[" not in text


def test_command_writes_figures_of_widths_and_of_lengths(runs, tmp_path):
    refused(call("analyze.scaling", runs), "two widths or lengths")
    wide, long = (shutil.copytree(runs, tmp_path / name) for name in ("short/wide", "long"))
    shutil.copytree(runs, tmp_path / "short/narrow")
    edit(wide, width=2)
    edit(long, "sparse", dense={"epochs": 6})
    edit(long, "permuted", match_epoch=6)
    text = succeed("analyze.scaling", tmp_path / "short", long)
    assert "T 3, 70%, k=1, permuted " in text and "width 0.03125, 70%, k=1, permuted " in text
    for x, values in (("width", {1 / 32, 2}), ("T", {3, 6})):
        table = pd.read_csv(tmp_path / f"short/figures/scaling_{x}_mlp_glyphs.csv")
        assert set(table[x]) == values
    refused(call("analyze.scaling", runs, runs), "same settings and seeds")
