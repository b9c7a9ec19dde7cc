"""Which channels of a network can be permuted: torchvision's, timm's if it is there, or one's own.

    python -m analyze.coverage [model ...] [--out docs/coverage.md]
    python -m analyze.coverage --model-fn my_nets:build [--input-shape 3 32 32]

Prints a row a network: its axes, how many channels may move freely, how many in blocks (grouped
convolutions, heads of attention), how many are pinned (the classes always are), and the seconds
that finding them took; a network that cannot be followed is named with the reason. For --model-fn
then what is pinned, layer by layer, and why.
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

Written by `python -m analyze.coverage --out docs/coverage.md`. Channels that move freely; in blocks
(grouped convolutions, heads of attention), within them and with them; and that are pinned, the ten
classes among them. `python -m analyze.coverage --model-fn M:F` says for a network of your own which
layers are pinned, and why.
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
    """A network of every family of timm that torchvision has not; none where timm is missing."""
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
        known = ", ".join(names() + timm_names())
        raise UserError(f"there is no classification network {name!r}: choose from {known}")
    # Their own initialisation of these two is very slow, and nothing here depends on it.
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **slow)


def image_size(name: str) -> int:
    """Pixels of a small input: the smallest that all poolings of the network leave something of."""
    whole = any(part in name for part in ("vit_", "maxvit", "mixer", "resmlp"))
    return 224 if whole else 96 if "inception" in name else 64


def count(axes: Axes) -> dict[str, int]:
    """Channels by what may become of them."""
    blocked = {axis for group in axes.groups if group.blocks > 1 for axis in group.axes}
    return {
        "axes": len(axes.sizes),
        "free": sum(size for axis, size in axes.sizes.items() if axis not in blocked),
        "in blocks": sum(axes.sizes[axis] for axis in blocked),
        "pinned": sum(size for size, _ in axes.pinned.values()),
    }


def main() -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("models", nargs="*", help="default: all of torchvision's, and one a family of timm's")
    add("--model-fn", metavar="M:F", help="function F() of module M that builds the network")
    add("--input-shape", type=cli.positive, nargs="+", default=[3, 32, 32], help="of --model-fn")
    add("--out", type=Path, metavar="FILE", help="write the table there, in Markdown")
    args = parser.parse_args()
    chosen = [args.model_fn] if args.model_fn else args.models or names() + timm_names()
    lines = [["model", "axes", "free", "in blocks", "pinned", "seconds"]]
    lines.append(["---", *["---:"] * 5])
    print(f"{'model':28}", *(f"{cell:>9}" for cell in lines[0][1:]))
    for name in chosen:
        if args.model_fn:
            model, shape = inputs.build(name), args.input_shape
        else:
            # Shapes are all that matters; but RegNets compute with tensors when they are built.
            with torch.device("cpu" if "regnet" in name or "." in name else "meta"):
                model, shape = build(name), (3, image_size(name), image_size(name))
        start = time.perf_counter()
        try:
            axes = find_axes(model, shape)
            found = [f"{number:,}" for number in count(axes).values()]
            lines.append([name, *found, f"{time.perf_counter() - start:.1f}"])
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
