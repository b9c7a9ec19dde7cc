"""Which channels of a network can be permuted: torchvision's, timm's if installed, or your own.

    python -m analyze.coverage [model ...] [--out docs/coverage.md]
    python -m analyze.coverage --model-fn my_nets:build [--input-shape 3 32 32]

Prints a row per network: the number of axes; of channels that move freely, that move in blocks
(grouped convolutions, attention heads), and that are pinned (the classes always are); and the
seconds that the search took. A network that torch.export cannot follow is listed with the reason.
With --model-fn also lists the pinned layers, with the reason for each.
"""

import time
from pathlib import Path

import torch
from torch import nn

from common import checkpoint, cli
from common.align import inputs
from common.align.axes import find_axes
from common.align.permutation import Axes
from common.errors import UserError
from common.vision import torchvision

CLASSES = 10
HEAD = """# What can be permuted

Written by `python -m analyze.coverage --out docs/coverage.md`: the number of channels that move
freely, that move in blocks (grouped convolutions, attention heads: within a block and together with
it), and that are pinned, among them the ten classes. `python -m analyze.coverage --model-fn M:F`
lists the pinned layers of your own network, with the reason for each.
"""
TIMM = (
    "resnet50d seresnet50 ecaresnet50d resnetv2_50 res2net50_26w_4s dla34 hrnet_w18_small "
    "efficientnetv2_rw_t convnextv2_atto repvgg_a0 ghostnet_100 darknet53 cspresnet50 xception41 "
    "nf_resnet50 tresnet_m selecsls42b mixer_s32_224 vit_tiny_patch16_224 resmlp_12_224 "
    "poolformer_s12 edgenext_xx_small mobilevit_xxs fastvit_t8 lcnet_050 tinynet_e rexnet_100 "
    "skresnet18"
).split()


def names() -> list[str]:
    """All classification networks of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def timm_names() -> list[str]:
    """A network of every family of timm that torchvision lacks; none if timm is not installed."""
    try:
        import timm  # noqa: F401
    except ImportError:
        return []
    return [f"timm.{name}" for name in TIMM]


def build(name: str) -> nn.Module:
    """An untrained network for ten classes; raises UserError for an unknown name."""
    if name in timm_names():
        import timm

        return timm.create_model(name.removeprefix("timm."), num_classes=CLASSES)
    if name not in names():
        choices = ", ".join(names() + timm_names())
        raise UserError(f"there is no classification network {name!r}: choose from {choices}")
    # The initialisation of these two is very slow, and nothing here depends on it.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)


def image_size(name: str) -> int:
    """The side, in pixels, of the smallest images that a network takes."""
    full_size = any(part in name for part in ("vit_", "maxvit", "mixer", "resmlp"))
    return 224 if full_size else 96 if "inception" in name else 64


def count(axes: Axes) -> dict[str, int]:
    """The number of axes, and of channels that move freely, move in blocks, and are pinned."""
    in_blocks = {axis for group in axes.groups if group.blocks > 1 for axis in group.axes}
    return {
        "axes": len(axes.sizes),
        "free": sum(size for axis, size in axes.sizes.items() if axis not in in_blocks),
        "in blocks": sum(axes.sizes[axis] for axis in in_blocks),
        "pinned": sum(size for size, _ in axes.pinned.values()),
    }


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("models", nargs="*", help="default: all of torchvision, and one per family of timm")
    add("--model-fn", metavar="M:F", help="function F() of module M that builds the network")
    add("--input-shape", type=cli.positive, nargs="+", default=[3, 32, 32], help="of --model-fn")
    add("--out", type=Path, metavar="FILE", help="write the table to this file, in Markdown")
    args = parser.parse_args()
    chosen = [args.model_fn] if args.model_fn else args.models or names() + timm_names()
    lines = [["model", "axes", "free", "in blocks", "pinned", "seconds"]]
    lines.append(["---", *["---:"] * 5])
    print(f"{'model':28}", *(f"{cell:>9}" for cell in lines[0][1:]))
    for name in chosen:
        if args.model_fn:
            model, shape = inputs.build(name), args.input_shape
        else:
            # Only shapes matter, but RegNets and timm's networks need values to be built.
            with torch.device("cpu" if "regnet" in name or "." in name else "meta"):
                model, shape = build(name), (3, image_size(name), image_size(name))
        start = time.perf_counter()
        try:
            axes = find_axes(model, shape)
            counts = [f"{number:,}" for number in count(axes).values()]
            lines.append([name, *counts, f"{time.perf_counter() - start:.1f}"])
        except UserError as error:
            if args.model_fn:
                raise
            lines.append([name, str(error)])
        first, *rest = lines[-1]
        print(f"{first:28}", *(f"{cell:>9}" for cell in rest), flush=True)
    if args.model_fn:
        for layer, (channels, reason) in axes.pinned.items():
            print(f"pinned: {channels:,} channels of {layer}: {reason}")
    if args.out:
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        checkpoint.save_text(f"{HEAD}\n{table}\n", args.out)


if __name__ == "__main__":
    cli.run(main)
