"""The paper's Figures 3 and 5 to 10, drawn by our code from the paper's own numbers.

python -m analyze.paper figures
"""

from pathlib import Path

from analyze.lib import panels, paper_numbers, style
from common import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the figures go")
    folder = parser.parse_args().folder
    for (model, dataset), points in paper_numbers.accuracies().groupby(["model", "dataset"]):
        levels = paper_numbers.of(paper_numbers.dense(), model, dataset)
        for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
            figure = panels.accuracy(points, levels, x, panel, f"the paper: {model} on {dataset}")
            style.save(figure, points, folder, f"paper_accuracy_{x}_{model}_{dataset}")
    for (model, dataset), points in paper_numbers.lines().groupby(["model", "dataset"]):
        figure = panels.widths(points, f"the paper: {model} on {dataset}")
        style.save(figure, points, folder, f"paper_interpolation_{model}_{dataset}")


if __name__ == "__main__":
    cli.run(main)
