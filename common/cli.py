"""What the stages' command lines share: flags with the paper's defaults, errors as one line."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from math import inf
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


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        distributed.let_rank_zero_print_first()
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], None], torchrun: bool = False) -> None:
    """Call a script's main; what the user can mend ends in one line and exit code 2.

    A bug ends in its traceback. `torchrun` says whether the script can be several processes
    (common/runtime/distributed.py), of which the first alone prints.
    """
    name = Path(sys.argv[0]).name
    try:
        if distributed.WORLD_SIZE > 1 and not torchrun:
            raise UserError("this is a single process: start it without torchrun")
        silent = contextlib.redirect_stdout(io.StringIO())
        with silent if distributed.RANK else contextlib.nullcontext():
            main()
            sys.stdout.flush()
            distributed.shut_down()
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        distributed.let_rank_zero_print_first()
        if (line := explain(error)) is None:
            raise
        print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- types


def number(
    kind: type, least: float = -inf, *, above: float = -inf, below: float = inf
) -> Callable[[str], Any]:
    """An argparse type for an int or float within a range."""
    limits = {"at least": least, "above": above, "below": below}
    bounds = " and ".join(f"{word} {end:g}" for word, end in limits.items() if abs(end) < inf)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}") from None
        if not (least <= value < below and value > above):  # so is NaN
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def _parallel(text: str) -> str:
    return text if text == "auto" else str(positive(text))


natural = number(int, 0, below=2**63)
positive = number(int, 1, below=2**63)
pixels = number(int, 8, below=2**16)
above_0 = number(float, above=0)
share = number(float, above=0, below=1)

# ---------------------------------------------------------------- argument groups

SETTINGS = {  # type and meaning
    "epochs": (positive, "epochs"),
    "lr": (above_0, "peak learning rate"),
    "schedule": (str, "learning rate by epoch: cosine to 0, or a tenth every 30 epochs"),
    "warmup": (natural, "epochs of linear warm-up, the last of them at --lr"),
    "weight_decay": (number(float, 0), "L2 penalty"),
    "batch_size": (positive, "images a step"),
    "momentum": (number(float, 0, below=1), "of SGD"),
}


def add_training(parser: argparse.ArgumentParser, stage: str) -> None:
    """The hyper-parameters of a stage; an unset one is None until `settings` knows the data set."""
    add = parser.add_argument_group("training (defaults are the paper's)").add_argument
    for name, (small, imagenet) in PAPER[stage].items():
        kind, text = SETTINGS[name]
        default = f"{small}" if small == imagenet else f"{small}; imagenet: {imagenet}"
        choices = SCHEDULES if name == "schedule" else None
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=kind, choices=choices, help=f"{text} (default: {default})")
    precisions = "default: bf16 where the hardware is fast at it, else fp32"
    add("--precision", choices=("fp32", "bf16"), help=precisions)
    add("--compile", action="store_true", help="torch.compile the network (a minute at the start)")
    side_by_side = "train N runs side by side: on a CPU as processes of one thread each, on a GPU "
    side_by_side += "in one process (default: one run after the other, with all threads)"
    add("--parallel", type=_parallel, metavar="auto|N", help=side_by_side)
    text = "minutes between two writings of the state within an epoch (default: 10)"
    add("--checkpoint-minutes", type=number(float, 0), default=10, metavar="M", help=text)
    add_tag(parser)


def settings(
    args: argparse.Namespace, stage: str, dataset: str, recipe: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The hyper-parameters of a stage: as asked for, else `recipe`'s, else the paper's."""
    values = {}
    for name, paper in PAPER[stage].items():
        asked = getattr(args, name)
        usual = recipe[name] if recipe else paper_value(paper, dataset)
        values[name] = usual if asked is None else asked
    return values


def paper_value(choices: tuple[Any, Any], dataset: str) -> Any:
    return choices[dataset == "imagenet"]


def how_to_train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The arguments of `train` that change no experiment, and the precision."""
    precision = pick_precision(args.precision, device)
    how = {"precision": precision, "compiled": args.compile, "progress": args.parallel is None}
    return how | {"checkpoint_minutes": args.checkpoint_minutes}


def add_tag(parser: argparse.ArgumentParser) -> None:
    text = "a name for an edit of the code, as tables show it; added to that of the inputs"
    parser.add_argument("--tag", help=text)


def joined_tag(*tags: str | None) -> str | None:
    """The tag of a run with tags of its inputs and its own: layerwise+adamw, each once, or None."""
    parts = "+".join(filter(None, tags)).split("+")
    return "+".join(dict.fromkeys(parts)) or None


def add_device(parser: argparse.ArgumentParser) -> None:
    text = "cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    parser.add_argument("--device", help=text)


def add_data(
    parser: argparse.ArgumentParser, where: str = "if not where stage 1 found the data set"
) -> None:
    parser.add_argument("--data-dir", help=where)
    text = "that read imagenet (default: %(default)s)"
    parser.add_argument("--workers", type=natural, default=8, help=text)


def experiment(args: argparse.Namespace, *inputs: str) -> dict[str, Any]:
    """All arguments but `inputs` and where and how fast a run goes: a flag that is added counts."""
    no_part = (*inputs, "out", "device", "data_dir", "workers", "parallel", "compile")
    no_part += ("checkpoint_minutes",)
    return {name: value for name, value in vars(args).items() if name not in no_part}
