"""Command lines of the stages: shared flags with the paper's defaults, one-line errors."""

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

from common import provenance
from common.errors import UserError, explain
from common.runtime import distributed, resume
from common.runtime.device import pick_precision
from common.training import SCHEDULES

# The paper's hyperparameters (appendix A.1 to A.3): (small images, ImageNet).
ALL_STAGES = {
    "schedule": ("cosine", "step"),
    "warmup": (0, 5),
    "weight_decay": (5e-4, 1e-4),
    "batch_size": (128, 1024),
    "momentum": (0.9, 0.9),
}
PAPER: dict[str, dict[str, tuple[Any, Any]]] = {
    "dense": {"epochs": (200, 80), "lr": (0.08, 0.4)} | ALL_STAGES,
    "imp": {"epochs": (50, 20), "lr": (0.01, 0.04)} | ALL_STAGES | {"warmup": (0, 0)},
    "sparse": {"lr": (0.02, 0.4)} | ALL_STAGES,
}
REWIND_EPOCHS = ((0, 5, 10, 15, 20, 25, 50, 75, 100), (10, 25, 50))


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        distributed.let_rank_zero_print_first()
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], None], torchrun: bool = False) -> None:
    """Call a script's `main`; errors that the user can fix print one line and exit with code 2.

    Bugs show their traceback. `torchrun` says whether the script supports several processes
    (common/runtime/distributed.py), of which only rank 0 prints.
    """
    script = Path(sys.argv[0]).name
    try:
        if distributed.WORLD_SIZE > 1 and not torchrun:
            raise UserError("this script is a single process: start it without torchrun")
        if torchrun:  # before a long run, during which somebody may edit the code
            provenance.stamp(main.__globals__["__file__"])
        silence = contextlib.redirect_stdout(io.StringIO())
        with silence if distributed.RANK else contextlib.nullcontext():
            main()
            sys.stdout.flush()
            distributed.shut_down()
    except BrokenPipeError:  # as when piped into `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        if resume.was_stopped(error):
            print(f"{script}: stopped; run the same command again to resume", file=sys.stderr)
            sys.exit(130)
        distributed.let_rank_zero_print_first()
        if (message := explain(error)) is None:
            raise
        print(f"{script}: error: {message}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- types


def number(
    number_type: type, minimum: float = -inf, *, above: float = -inf, below: float = inf
) -> Callable[[str], Any]:
    """Return an argparse type for an int or float in a range."""
    limits = {"at least": minimum, "above": above, "below": below}
    bounds = [f"{name} {end:g}" for name, end in limits.items() if abs(end) < inf]
    bounds = " and ".join(bounds if number_type is int or below < inf else [*bounds, "finite"])

    def parse(text: str) -> Any:
        try:
            value = number_type(text)
        except ValueError:
            expected = "whole number" if number_type is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {expected}") from None
        if not (minimum <= value < below and value > above):  # also true for NaN
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


def _parallel(text: str) -> str:
    return text if text == "auto" else str(positive(text))


natural = number(int, 0, below=2**63)
positive = number(int, 1, below=2**63)
pixels = number(int, 8, below=2**16)
positive_float = number(float, above=0)
fraction = number(float, above=0, below=1)

# ---------------------------------------------------------------- argument groups

HYPERPARAMETERS = {  # type and help
    "epochs": (positive, "training epochs, in stage 2 per round"),
    "lr": (positive_float, "learning rate, which the schedule scales"),
    "schedule": (str, "learning rate per epoch: cosine to 0, or divided by 10 every 30 epochs"),
    "warmup": (natural, "epochs over which the schedule is scaled up linearly"),
    "weight_decay": (number(float, 0), "L2 penalty"),
    "batch_size": (positive, "images per step"),
    "momentum": (number(float, 0, below=1), "of SGD"),
}


def add_training(parser: argparse.ArgumentParser, stage: str) -> None:
    """Add the training flags of a stage; `hyperparameters` fills in those that are not given."""
    add = parser.add_argument_group("training (defaults are the paper's)").add_argument
    for name, (small, imagenet) in PAPER[stage].items():
        value_type, text = HYPERPARAMETERS[name]
        default = f"{small}" if small == imagenet else f"{small}; imagenet: {imagenet}"
        choices = SCHEDULES if name == "schedule" else None
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=value_type, choices=choices, help=f"{text} (default: {default})")
    precisions = "default: bf16 if the hardware is fast at it, else fp32"
    add("--precision", choices=("fp32", "bf16"), help=precisions)
    add("--compile", action="store_true", help="use torch.compile (takes a minute at the start)")
    text = "train N runs in parallel: on a CPU as processes of one thread each, on a GPU in one "
    text += "process (default: one run after the other, with all threads)"
    add("--parallel", type=_parallel, metavar="auto|N", help=text)
    text = "minutes between saves of the state within an epoch (default: 10)"
    add("--checkpoint-minutes", type=number(float, 0), default=10, metavar="M", help=text)
    add_tag(parser)


def hyperparameters(
    args: argparse.Namespace, stage: str, dataset: str, defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the hyperparameters of a stage: the flags, else `defaults`, else the paper's."""
    values = {}
    for name, paper in PAPER[stage].items():
        value = getattr(args, name)
        default = defaults[name] if defaults else paper_value(paper, dataset)
        values[name] = default if value is None else value
    return values


def paper_value(values: tuple[Any, Any], dataset: str) -> Any:
    """Choose from (small images, ImageNet)."""
    return values[dataset == "imagenet"]


def training_options(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `train` for precision, speed and output."""
    return {
        "precision": pick_precision(args.precision, device),
        "compiled": args.compile,
        "progress": args.parallel is None,
        "checkpoint_minutes": args.checkpoint_minutes,
    }


def add_tag(parser: argparse.ArgumentParser) -> None:
    text = "a name for an edit of the code, shown in tables and appended to the tag of the inputs"
    parser.add_argument("--tag", help=text)


def joined_tag(*tags: str | None) -> str | None:
    """Join the tags of a run's inputs and its own, each once: layerwise+adamw; None without any."""
    parts = "+".join(filter(None, tags)).split("+")
    return "+".join(dict.fromkeys(parts)) or None


def add_device(parser: argparse.ArgumentParser) -> None:
    text = "cpu, cuda, cuda:1, ... (default: cuda if available)"
    parser.add_argument("--device", help=text)


def add_data(
    parser: argparse.ArgumentParser, text: str = "folder of the data set (default: as in stage 1)"
) -> None:
    parser.add_argument("--data-dir", help=text)
    workers = "processes that read imagenet (default: %(default)s)"
    parser.add_argument("--workers", type=natural, default=8, help=workers)


def experiment_arguments(args: argparse.Namespace, *inputs: str) -> dict[str, Any]:
    """Return the flags that define an experiment, which include any flag that is added later.

    Excludes `inputs`, and the flags that only say where and how fast it runs.
    """
    excluded = (*inputs, "out", "device", "data_dir", "workers", "parallel", "checkpoint_minutes")
    return {name: value for name, value in vars(args).items() if name not in excluded}
