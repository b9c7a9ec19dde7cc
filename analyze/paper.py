"""The paper's figures, drawn by our code from its numbers, and its tables beside ours.

    python -m analyze.paper figures          # Figures 3 and 5 to 11
    python -m analyze.paper --table 5 R      # Table 5 of the paper beside the runs below R

A table has the paper's layout: ours, the paper's number and the difference, and is written to
R/tables/ as CSV and LaTeX (package booktabs). Table 1 needs `python -m analyze.diversity R`.
"""

from pathlib import Path

from analyze.lib import panels, paper_numbers, style
from analyze.lib.paper_numbers import TABLES
from common import cli


def draw_figures(folder: Path) -> None:
    """Draw and save all figures of accuracies and of lines."""
    for metric in panels.METRICS:
        table = paper_numbers.accuracies(metric)
        for (model, dataset), points in table.groupby(["model", "dataset"]):
            title, name = f"the paper: {model} on {dataset}", f"paper_{{}}_{model}_{dataset}"
            panels.save_accuracy(points, title, metric, folder, name)
    for (model, dataset), points in paper_numbers.lines().groupby(["model", "dataset"]):
        figure = panels.draw_lines(points, f"the paper: {model} on {dataset}")
        style.save_figure(figure, points, folder, f"paper_interpolation_{model}_{dataset}")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where figures go; with --table, folder of runs")
    parser.add_argument("--table", type=int, choices=TABLES, metavar="N", help="1 or 5 to 16")
    args = parser.parse_args()
    if args.table is None:
        draw_figures(args.folder)
        return
    folder = args.folder / "tables"
    table = paper_numbers.save_comparison(
        args.table, paper_numbers.our_results(args.folder), folder
    )
    print(f"Table {args.table}\n{table.to_string()}")
    if other := paper_numbers.other_settings(args.folder):
        print(f"our settings that differ from the paper's (in brackets): {other}")
    print(f"wrote {folder / f'table_{args.table}'}.csv and .tex")


if __name__ == "__main__":
    cli.run(main)
