"""What the command lines of the stages share: argument groups with the paper's defaults, and errors
as one line.
"""

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, explain
from common.runtime import distributed
from common.runtime.device import pick_precision
from common.training import SCHEDULES

# The paper's settings (appendix A.1 to A.3): (small images, ImageNet).
ALL = {
    "schedule": ("cosine", "step"),
    "warmup": (0, 5),
    "weight_decay": (5e-4, 1e-4),
    "batch_size": (128, 1024),
    "momentum": (0.9, 0.9),
}
PAPER: dict[str, dict[str, tuple[Any, Any]]] = {
    "dense": {"epochs": (200, 80), "lr": (0.08, 0.4)} | ALL,
    "imp": {"epochs": (50, 20), "lr": (0.01, 0.04)} | ALL | {"warmup": (0, 0)},
    "sparse": {"lr": (0.02, 0.4)} | ALL,
}
REWIND_EPOCHS = ((0, 5, 10, 15, 20, 25, 50, 75, 100), (10, 25, 50))
MATCH_IMAGES = (None, 12_800)
MATCH_BATCH = (250, 32)  # what stays in a processor's cache, and what fits beside two wide networks
HELP = {
    "epochs": "epochs",
    "lr": "peak learning rate",
    "schedule": "learning rate by epoch: cosine to 0, or a tenth every 30 epochs",
    "warmup": "epochs of linear warm-up",
    "weight_decay": "L2 penalty",
    "batch_size": "images a step",
    "momentum": "of SGD",
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        distributed.let_rank_zero_speak()
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], None], torchrun: bool = False) -> None:
    """Call a script's main; what the user can mend ends in one line and exit code 2, a bug in its
    traceback.

    `torchrun` says whether the script can be several processes (common/runtime/distributed.py), of
    which the first alone prints.
    """
    name = Path(sys.argv[0]).name
    try:
        if distributed.WORLD_SIZE > 1 and not torchrun:
            raise UserError("this is a single process: start it without torchrun")
        silent = contextlib.redirect_stdout(io.StringIO())
        with silent if distributed.RANK else contextlib.nullcontext():
            main()
            distributed.shut_down()
    except Exception as error:
        distributed.let_rank_zero_speak()
        if (line := explain(error)) is None:
            raise
        print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on from the last epoch", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- types


def number(
    kind: type,
    low: float,
    high: float = float("inf"),
    open_low: bool = False,
    open_high: bool = False,
) -> Callable[[str], Any]:
    """An argparse type for an int or float within a range."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            outside = (
                not low <= value <= high
                or (open_low and value == low)
                or (open_high and value == high)
            )
            outside = outside or not math.isfinite(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no {'whole ' if kind is int else ''}number"
            ) from None
        except OverflowError:  # a whole number of hundreds of digits
            raise argparse.ArgumentTypeError("that number is too large") from None
        if outside:
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            bounds += (
                ""
                if high == float("inf")
                else f" and {'below' if open_high else 'at most'} {high:g}"
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def _parallel(text: str) -> str:
    return text if text == "auto" else str(positive(text))


natural = number(int, 0, 2**63 - 1)
positive = number(int, 1)
share = number(float, 0, 1, open_low=True, open_high=True)


# ---------------------------------------------------------------- argument groups


def add_training(parser: argparse.ArgumentParser, stage: str) -> None:
    """The hyper-parameters of a stage; an unset one is None until `settings` knows the data set."""
    group = parser.add_argument_group("training (defaults are the paper's)")
    kinds = {
        "epochs": positive,
        "lr": number(float, 0, open_low=True),
        "warmup": natural,
        "weight_decay": number(float, 0),
        "batch_size": positive,
        "momentum": number(float, 0, 1, open_high=True),
        "schedule": str,
    }
    for name, (small, imagenet) in PAPER[stage].items():
        default = f"{small}" if small == imagenet else f"{small}; imagenet: {imagenet}"
        choices = [*SCHEDULES] if name == "schedule" else None
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kinds[name],
            choices=choices,
            help=f"{HELP[name]} (default: {default})",
        )
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="default: bf16 where the hardware is fast at it, else fp32",
    )
    add_tag(parser)
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the network (a minute at the start)"
    )
    group.add_argument(
        "--parallel",
        type=_parallel,
        metavar="auto|N",
        help="train N runs side by side: on a CPU as processes of one thread each, on a GPU in "
        "one process (default: one run after the other, with all threads)",
    )


def settings(
    args: argparse.Namespace, stage: str, dataset: str, recipe: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The hyper-parameters of a stage: as asked for, else `recipe`'s, else the paper's."""
    papers = {name: paper_value(values, dataset) for name, values in PAPER[stage].items()}
    usual = papers | {name: recipe[name] for name in papers if recipe}
    asked = {name: getattr(args, name) for name in papers}
    return usual | {name: value for name, value in asked.items() if value is not None}


def paper_value(choices: tuple[Any, Any], dataset: str) -> Any:
    return choices[dataset == "imagenet"]


def how_to_train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The arguments of `train` that change no experiment, and the precision."""
    precision = pick_precision(args.precision, device)
    return {"precision": precision, "compiled": args.compile, "progress": args.parallel is None}


def add_tag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tag",
        help="a name for an edit of the code, as tables show it; added to that of the inputs",
    )


def joined_tag(inherited: str | None, own: str | None) -> str | None:
    """The tag of a run whose inputs have one already: layerwise+adamw, or the only one there is."""
    return "+".join(dict.fromkeys(filter(None, (*(inherited or "").split("+"), own)))) or None


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )


def add_data(
    parser: argparse.ArgumentParser, where: str = "if not where stage 1 found the data set"
) -> None:
    parser.add_argument("--data-dir", help=where)
    parser.add_argument(
        "--workers", type=natural, default=8, help="that read imagenet (default: %(default)s)"
    )


def hyper(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The named arguments as a dict, for a run's record of itself."""
    return {name: getattr(args, name) for name in names}
