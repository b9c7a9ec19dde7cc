"""Which channels of torchvision's classification networks can be permuted.

    python -m analyze.coverage [model ...]

Prints a row a network: its axes, how many channels may move freely, how many within a fixed
division into blocks (grouped convolutions), how many are pinned (the classes always are), and the
seconds that finding them took. A network that cannot be followed is named with the layer that
stands in the way.
"""

import time

import torch

from common import cli
from common.align.axes import find_axes
from common.align.permutation import Axes
from common.errors import UserError
from common.vision import torchvision

CLASSES = 10


def names() -> list[str]:
    """All classification networks of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def build(name: str) -> torch.nn.Module:
    """An untrained torchvision network for ten classes; raises UserError for an unknown name."""
    if name not in names():
        known = ", ".join(names())
        raise UserError(f"torchvision has no classification network {name!r}: choose from {known}")
    # Their own initialisation of these two is very slow, and nothing here depends on it.
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **slow)


def image_size(name: str) -> int:
    """Pixels of a small input: the smallest that all poolings of the network leave something of."""
    return 224 if name.startswith(("vit", "maxvit")) else 96 if name == "inception_v3" else 64


def count(axes: Axes) -> dict[str, int]:
    """Channels by what may become of them."""
    blocked = {axis for unit in axes.units if unit.blocks > 1 for axis in unit.axes}
    return {
        "axes": len(axes.sizes),
        "free": sum(size for axis, size in axes.sizes.items() if axis not in blocked),
        "in blocks": sum(axes.sizes[axis] for axis in blocked),
        "pinned": sum(size for size, _ in axes.pinned.values()),
    }


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("models", nargs="*", help="default: all of torchvision's")
    chosen = parser.parse_args().models or names()
    width = max(map(len, chosen))
    print(f"{'model':{width}}   axes     free  in blocks   pinned  seconds")
    for name in chosen:
        start = time.perf_counter()
        try:
            # Shapes are all that matters; but RegNets compute with tensors when they are built.
            with torch.device("cpu" if name.startswith("regnet") else "meta"):
                model = build(name)
            found = count(find_axes(model, (3, image_size(name), image_size(name))))
        except UserError as error:
            if name not in names():
                raise
            print(f"{name:{width}}   {error}")
            continue
        numbers = "{axes:6,} {free:8,} {in blocks:10,} {pinned:8,}".format(**found)
        print(f"{name:{width}} {numbers} {time.perf_counter() - start:8.1f}", flush=True)


if __name__ == "__main__":
    cli.run(main)
