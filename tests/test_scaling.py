"""The share of the gap against width and training length."""

import shutil

import numpy as np
import pandas as pd
import pytest

from analyze import scaling
from tests.conftest import call, edit, refused, result, succeed
from tests.test_results import PAIRS, frame, make_grid, make_rows


def rows_of(x, rows):
    return scaling.scaling(scaling.permuted_gains(frame(rows)), x)


def test_shares_and_slopes_by_hand():
    # LTH of seeds 0, 2 and 4 is 90.0, 90.2 and 90.4, naive 70: the gap is 20.0, 20.2 and 20.4.
    gains = np.array([[8, 9, 10], [12, 15, 10]])
    rows = [make_grid(gains=row, width=width) for row, width in zip(gains, (1.0, 4.0))]
    table = rows_of("width", sum(rows, []))
    shares = 100 * gains.sum(1) / 60.6
    assert [*table["width"]] == [1, 4] and [*table["share"]] == pytest.approx([*shares])
    # From width 1 to 4 it doubles twice.
    assert [*table["difference"]] == pytest.approx(2 * [(shares[1] - shares[0]) / 2])
    residuals = 100 * (gains - shares[:, None] / 100 * [20, 20.2, 20.4]) / 20.2
    error = ((residuals[1] - residuals[0]) / 2).std(ddof=1) / 3**0.5
    assert [*table["difference_se"]] == pytest.approx([error, error])
    assert (table["pairs"] == 3).all() and (table["p"] == table["p_holm"]).all()


def test_only_pairs_that_all_widths_have_are_compared():
    narrow = make_grid(PAIRS[1:], gains=(9, 10), width=1.0)
    wide = make_grid(gains=(2, 11, 12), width=2.0)
    table = rows_of("width", narrow + wide)
    assert (table["pairs"] == 2).all()
    assert [*table["share"]] == pytest.approx([100 * 19 / 40.6, 100 * 23 / 40.6])
    assert rows_of("width", narrow + wide[:3]).empty
    assert rows_of("width", narrow[1:2] + wide).empty  # naive alone
    # A pair without a gap counts, a width without a gap does not.
    narrow[:2] = make_rows("lth 2 2 69, naive 2 3 70", width=1.0)
    table = rows_of("width", narrow + wide)
    assert table["share"].iloc[0] == pytest.approx(100 * 19 / 19.4) and (table["pairs"] == 2).all()
    narrow[3:5] = make_rows("lth 4 4 69, naive 4 5 70", width=1.0)
    assert rows_of("width", narrow + wide).empty


def test_lengths_are_compared_at_equal_k_and_at_equal_fractions_of_length():
    rows = make_grid(dense_epochs=20) + make_grid(rewind=5, dense_epochs=20)
    rows += make_grid(dense_epochs=40) + make_grid(rewind=5, dense_epochs=40)
    rows += make_grid(gains=(1, 2, 3), rewind=10, dense_epochs=40)
    rows += make_grid(rewind=3, dense_epochs=80) + make_grid(rewind=5, dense_epochs=float("nan"))
    for row in rows:
        row["match_epoch"] = row["dense_epochs"]
    shares = rows_of("T", rows).set_index(["k", "T"])["share"].round(1).to_dict()
    same = {(k, T): 49.5 for k in ("k=0", "k=5") for T in (20, 40)}
    assert shares == same | {("k=0.25T", 20): 49.5, ("k=0.25T", 40): 9.9}
    assert rows_of("width", rows).empty


def test_holm_is_over_the_slopes_not_over_the_rows():
    rows = []
    for k, last in ((0, 12), (1, 10.5)):
        for width in (1.0, 2.0, 4.0):
            rows += make_grid(gains=(9 + k, 10 + width, last + width), width=width, rewind=k)
    table = rows_of("width", rows)
    p = table.drop_duplicates("k")["p"]
    assert p.nunique() == 2 and table["p_holm"].max() == pytest.approx(max(2 * p.min(), p.max()))


def test_pairs_that_share_a_network_have_no_interval():
    pairs = ((0, 1), (0, 3), (0, 5))
    rows = make_grid(pairs, width=1.0) + make_grid(pairs, gains=(12, 14, 13), width=2.0)
    table = rows_of("width", rows)
    assert table["difference"].notna().all() and table[["p", "low", "high"]].isna().all(axis=None)
    text = scaling.render(table.assign(panel="all"), "width")
    assert "(3 pairs)" in text and "[" not in text


def test_command_compares_runs_that_differ_in_width_or_epochs_only(runs, tmp_path):
    for name in ("widths/narrow", "widths/wide", "long"):
        shutil.copytree(runs / "sparse", tmp_path / name)
    edit(tmp_path, "lth", test_acc=90)  # a gap
    edit(tmp_path / "widths", "wide", width=2)
    refused(call("analyze.scaling", tmp_path / "long", tmp_path / "widths"), "same settings")
    for path in (tmp_path / "long").rglob("result.json"):
        dense = result(path.parent)["dense"] | {"epochs": 6}
        edit(path.parents[1], path.parent.name, dense=dense)
    edit(tmp_path / "long", "permuted", match_epoch=6)
    text = succeed("analyze.scaling", tmp_path / "widths", tmp_path / "long")
    assert "T=3, 70%, k=1, permuted " in text and "width=0.03125, 70%, k=1, permuted " in text
    for x, values in (("width", {1 / 32, 2}), ("T", {3, 6})):
        table = pd.read_csv(tmp_path / f"widths/figures/scaling_{x}_mlp_glyphs.csv")
        assert set(table[x]) == values and set(table["variant"]) == {"permuted"}
    edit(tmp_path / "widths", "wide", batch_size=32)
    refused(call("analyze.scaling", tmp_path / "widths"), "of equal settings", "two widths")
