"""The inputs of stage 3: runs of stages 1 and 2, or networks trained elsewhere with their masks."""

import argparse
import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import checkpoint, cli, masking, paths
from common.align.axes import find_axes
from common.align.matching import SIMILARITIES
from common.align.permutation import Axes
from common.data import DATASETS, Resident, Streamed, load_data
from common.errors import UserError
from common.models import build_model, check_fits

# For (small images, ImageNet): the images for matching, None for all, and their batch size.
MATCH_IMAGES = (None, 12_800)
MATCH_BATCH = (250, 32)  # fits the CPU cache; fits in memory beside two wide networks
OPTIONS = {"match_on": "post", "statistic": "correlation", "stream": "last"}  # the paper's

Entry = dict[str, Any]  # the content of a checkpoint or of a mask file
Images = Callable[[], Resident | Streamed | None]
# Source, target, masks by file name, the two modules, and a function that loads the images.
Inputs = tuple[Entry, Entry, dict[str, Entry], list[nn.Module], Images]


def add_matching(parser: argparse.ArgumentParser) -> None:
    """The flags of activation matching."""
    add = parser.add_argument_group("activation matching (defaults are the paper's)").add_argument
    add("--match-images", type=cli.positive, metavar="N", help="default: all; imagenet: 12800")
    add("--batch-size", type=cli.positive, help="images per pass (default: 250; imagenet: 32)")
    for name, choices, text in (
        ("match_on", ("post", "pre"), "activations after or before the nonlinearity"),
        ("statistic", SIMILARITIES, "of two channels over images and positions"),
        ("stream", ("last", "mean"), "in a residual stream: its last block, or the mean over all"),
    ):
        flag, text = f"--{name.replace('_', '-')}", f"{text} (default: {OPTIONS[name]})"
        add(flag, choices=choices, default=OPTIONS[name], help=text)


def add_external(parser: argparse.ArgumentParser) -> None:
    """The flags for networks trained elsewhere."""
    group = parser.add_argument_group("networks trained elsewhere, as state dicts")
    add = group.add_argument
    add("--model-fn", metavar="M:F", help="function F() of module M that builds the network")
    add(
        "--dataset", choices=DATASETS, help="for matching activations, with its usual normalisation"
    )
    add("--image-size", type=cli.pixels, metavar="PX", help="of that data set")
    add("--input-shape", type=cli.positive, nargs="+", help="without --dataset (default: 3 32 32)")


def check_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, used_by: dict[str, tuple[str, ...]]
) -> None:
    """Exit with an error when flags are missing or do not go together.

    `used_by` names the methods that use a flag.
    """
    for flag, methods in used_by.items():
        if args.method not in methods and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--method {args.method} takes no --{flag.replace('_', '-')}")
    if args.model_fn and args.target_epoch is not None:
        parser.error("--target-epoch is for dense runs, not for --model-fn's state dicts")
    if args.model_fn is None and (args.dataset or args.image_size or args.input_shape):
        parser.error("--dataset, --image-size and --input-shape go with --model-fn")
    if args.dataset and args.input_shape or args.image_size and not args.dataset:
        parser.error(
            "the shape of images comes from --dataset, with --image-size, or --input-shape"
        )
    if args.model_fn is None and args.masks is None:
        parser.error("--masks is needed: the masks folder of the source, from prune_imp.py")
    if args.model_fn and args.method in used_by["match_images"] and args.dataset is None:
        parser.error(f"--method {args.method} needs images: name them with --dataset")


def load_runs(
    source_run: Path,
    target_run: Path,
    masks_folder: Path,
    target_epoch: int | None,
    data_dir: str | None,
    device: torch.device,
    workers: int,
) -> Inputs:
    """Load runs of stage 1 and masks of stage 2; raises UserError when they do not match."""
    source = checkpoint.load_dense(source_run)
    target = checkpoint.load_dense(target_run, target_epoch)
    if source["model"] != target["model"]:
        raise UserError(
            f"source and target differ: {source['model']} and {target['model']}: "
            "train both with the same --model, --width and image size"
        )
    if (source["seed"], source["dataset"]["name"]) == (target["seed"], target["dataset"]["name"]):
        raise UserError(f"source and target are the same network, of seed {source['seed']}")
    masks = masking.load_all(masks_folder, source)
    networks = [build_model(**entry["model"], seed=entry["seed"]) for entry in (source, target)]
    images = functools.partial(load_data, target["dataset"], data_dir, device, workers)
    return source, target, masks, networks, images


def load_external(
    model_fn: str,
    source_file: Path,
    target_file: Path,
    masks_path: Path | None,
    dataset: str | None,
    image_size: int | None,
    input_shape: list[int] | None,
    data_dir: str | None,
    device: torch.device,
    workers: int,
) -> Inputs:
    """Load state dicts, and masks of this project or of torch.nn.utils.prune, by default from the
    source's file.
    """
    networks, images = [build(model_fn), build(model_fn)], None
    if networks[0] is networks[1]:
        raise UserError(f"--model-fn {model_fn} must build a new network in every call")
    if dataset:
        entry = {"name": dataset, "image_size": image_size}
        images = load_data(entry, data_dir, device, workers)
    shape = list(images.input_shape) if images else input_shape or [3, 32, 32]
    source, target = (
        load_weights(path, model_fn, network, shape)
        for path, network in zip((source_file, target_file), networks)
    )
    if source["sha256"] == target["sha256"]:
        raise UserError(f"source and target are the same network: {source_file} and {target_file}")
    masks = load_masks(masks_path or source_file, source, networks[0])
    return source, target, masks, networks, lambda: images


def free_axes(network: nn.Module, input_shape: list[int]) -> Axes:
    """The axes of a network; raises UserError, with the reasons, when it has none.

    Prints which of its channels stay in place, except for the outputs.
    """
    axes = find_axes(network, input_shape)
    if not axes.sizes:
        reasons = "; ".join(f"{axis}: {reason}" for axis, (_, reason) in axes.pinned.items())
        raise UserError(f"nothing in this network can be permuted ({reasons})")
    for axis, (channels, reason) in axes.pinned.items():
        if not reason.endswith("is the output"):
            print(f"{axis}: {channels} channels stay in place: {reason}")
    return axes


def check_fixed_buffers(networks: list[nn.Module], permuted: dict[str, Tensor]) -> None:
    """Raise UserError if `permuted` moves a buffer that both networks share.

    The target keeps its own, as of an encoding of positions, so π would not be a symmetry of it.
    """
    target, modules = dict(networks[1].named_buffers()), dict(networks[0].named_modules())
    for name, buffer in networks[0].named_buffers():
        is_learned = isinstance(modules[name.rpartition(".")[0]], _BatchNorm)
        if is_learned or name not in permuted or not torch.equal(buffer, target[name]):
            continue
        if not torch.equal(buffer, permuted[name].to(buffer)):
            raise UserError(
                f"{name} is the same in source and target, but its channels would be permuted: "
                "register this buffer with persistent=False and delete it from the files, then "
                "they stay in place"
            )


def build(name: str) -> nn.Module:
    """Call `package.module:function`, also from the working directory, to build a network.

    Raises UserError when there is no such function, or it does not return a module.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        advice = "write it as package.module:function"
        raise UserError(f"--model-fn {name}: {error}; {advice}") from error
    if not callable(make):
        raise UserError(f"--model-fn {name} is a {type(make).__name__}, not a function")
    try:
        with contextlib.suppress(ValueError):  # as a built-in one has no signature
            inspect.signature(make).bind()
    except TypeError as error:
        raise UserError(f"--model-fn {name} is called without arguments: {error}") from error
    network = make()
    kind = type(network).__name__
    if not isinstance(network, nn.Module):
        raise UserError(f"--model-fn {name} returned a {kind}, not a torch.nn.Module")
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        advice = "return its .module, and save that module's state dict"
        raise UserError(f"--model-fn {name} returned a {kind}: {advice}")
    return network


def _read(path: Path) -> tuple[dict[str, Tensor], masking.Mask]:
    """The weights and mask of a state dict, also where it is under the key `state_dict`."""
    content = checkpoint.load(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not _holds_tensors(content):
        keys = f" (it holds {shorten(', '.join(map(str, content)), 80)})" if content else ""
        raise UserError(f"{path} is not a state dict: save model.state_dict(){keys}")
    return masking.from_prune({name: value.detach() for name, value in content.items()})


def _holds_tensors(content: Any) -> bool:
    """Whether this is a dict of tensors."""
    return isinstance(content, dict) and all(isinstance(x, Tensor) for x in content.values())


def load_weights(path: Path, name: str, model: nn.Module, input_shape: list[int]) -> Entry:
    """Load a state dict in the form of `checkpoint.load_dense`; the file's name is the seed.

    For a network pruned by torch.nn.utils.prune, the weights are the masked ones. Raises UserError
    when they do not fit `model`, which the function `name` built.
    """
    weights, mask = _read(path)
    if mask:
        print(f"{path} is pruned: its masked weights are matched")
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    check_fits(weights, model, path, name)
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"the weights of {path} are not finite")
    entry = {"model": {"name": name, "input_shape": input_shape}, "dataset": None}
    entry |= {"seed": path.stem, "epoch": None, "sha256": checkpoint.digest(path)}
    return entry | {"state_dict": weights}


def load_masks(path: Path, source: Entry, model: nn.Module) -> dict[str, Entry]:
    """Load the source's masks, by the file name for each of them in the output folder.

    `path` is a folder of mask_*.pt, which need only the key `mask`, or a state dict in the form of
    torch.nn.utils.prune. Raises UserError when there is no mask, or one does not fit.
    """
    if path.is_dir():
        files = sorted(path.glob("mask_*.pt"))  # the part after mask_ is free
        entries = {file: checkpoint.load(file, ("mask",)) for file in files}
        for file, entry in entries.items():
            if entry.get("target_seed") is not None:
                raise UserError(f"{file} is permuted already: pass the masks of the source")
        loaded = {file: entry["mask"] for file, entry in entries.items()}
    else:
        loaded = {path: mask} if (mask := _read(path)[1]) else {}
    if not loaded:
        expected = "a folder of mask_*.pt, or a state dict with weight_mask entries"
        raise UserError(f"no masks in {path}: --masks takes {expected}, as before prune.remove")
    masks = {}
    for file, mask in loaded.items():
        if not mask or not _holds_tensors(mask):
            expected = "`mask` must have a bool tensor for each pruned weight"
            raise UserError(f"{file} holds no mask: {expected}")
        masking.check_fits(mask, source["state_dict"], file)
        signs = masking.signs(source["state_dict"], list(mask))
        network = source | {"mask": mask, "signs": signs, "tag": None}
        entry = masking.mask_info(network, model) | {"unpermuted": checkpoint.digest(file)}
        name = paths.mask_file(path, round(entry["sparsity"], 4)).name
        masks[file.name if path.is_dir() else name] = entry
    return masks


def matched_images(
    data: Resident | Streamed, count: int | None, batch_size: int | None
) -> Iterator[Tensor]:
    """Batches of training images for matching; the defaults depend on the data set."""
    streamed = isinstance(data, Streamed)
    limits = batch_size or MATCH_BATCH[streamed], count or MATCH_IMAGES[streamed]
    for images, _ in data.eval_batches("train", *limits):
        yield images


def unpermuted(masks: dict[str, Entry], out: Path) -> dict[str, Entry]:
    """The masks whose permuted ones are missing in `out`.

    Raises UserError when a file there is a permutation of another mask.
    """
    missing = {}
    for name, mask in masks.items():
        if not (out / name).is_file():
            missing[name] = mask
        elif checkpoint.load(out / name, ("unpermuted",))["unpermuted"] != mask["unpermuted"]:
            raise UserError(f"{out / name} is a permutation of another mask: choose another --out")
    return missing


def load_permutation(path: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The content of a permutation file, or None when it does not exist.

    Raises UserError when its source, target, mask or matching code is not that of `origin`.
    """
    if not path.is_file():
        return None
    saved = checkpoint.load(path, ("permutation", "objective", "rows"))
    for key in ("source", "target", "unpermuted", "matching"):
        if saved.get(key) != origin[key]:
            cause = "by other matching code" if key == "matching" else f"of another {key}"
            change = f"{saved.get(key)} then, {origin[key]} now"
            raise UserError(f"{path} was made {cause} ({change}): choose another --out")
    return saved
