"""What stage 3 reads: runs of stages 1 and 2, or networks trained elsewhere with their masks."""

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint, cli, masking, paths
from common.align.axes import find_axes
from common.align.matching import SIMILARITIES
from common.align.permutation import Axes
from common.data import DATASETS, Resident, Streamed, load_data
from common.errors import UserError
from common.models import build_model, check_fits

# Images that are matched on, and in a pass: (small images, ImageNet).
MATCH_IMAGES = (None, 12_800)
MATCH_BATCH = (250, 32)  # what stays in a processor's cache, and what fits beside two wide networks
HOW = {"match_on": "post", "statistic": "correlation", "stream": "last"}  # the paper's

Entry = dict[str, Any]  # the content of a checkpoint or of a mask file
Images = Callable[[], Resident | Streamed | None]
# Source, target, masks by file name, the two modules, and what reads the images.
Inputs = tuple[Entry, Entry, dict[str, Entry], list[nn.Module], Images]


def add_matching(parser: argparse.ArgumentParser) -> None:
    """The flags of activation matching."""
    add = parser.add_argument_group("activation matching (defaults are the paper's)").add_argument
    add("--match-images", type=cli.positive, metavar="N", help="default: all; imagenet: 12800")
    add("--batch-size", type=cli.positive, help="images a pass (default: 250; imagenet: 32)")
    for name, choices, text in (
        ("match_on", ("post", "pre"), "values after or before the nonlinearity"),
        ("statistic", SIMILARITIES, "of two channels over images and places"),
        ("stream", ("last", "mean"), "of a residual stream its last block, or the mean over all"),
    ):
        flag, text = f"--{name.replace('_', '-')}", f"{text} (default: {HOW[name]})"
        add(flag, choices=choices, default=HOW[name], help=text)


def add_external(parser: argparse.ArgumentParser) -> None:
    """The flags for networks trained elsewhere."""
    group = parser.add_argument_group("networks trained elsewhere: --source, --target: state dicts")
    add = group.add_argument
    add("--model-fn", metavar="M:F", help="function F() of module M that builds the network")
    add("--dataset", choices=DATASETS, help="to match activations on, by its own normalisation")
    add("--image-size", type=cli.pixels, metavar="PX", help="of that data set")
    add("--input-shape", type=cli.positive, nargs="+", help="without --dataset (default: 3 32 32)")


def check_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, needs_images: bool
) -> None:
    """Whether the flags of runs, or those of networks trained elsewhere, are complete."""
    other = [name for name, paper in HOW.items() if getattr(args, name) != paper]
    if not needs_images and (other or args.match_images):
        flags = "--match-on, --statistic, --stream or --match-images"
        parser.error(f"--method {args.method} takes no {flags}")
    if args.model_fn and args.target_epoch is not None:
        parser.error("--target-epoch is of a dense run, not of --model-fn's state dicts")
    if args.model_fn is None and (args.dataset or args.image_size or args.input_shape):
        parser.error("--dataset, --image-size and --input-shape go with --model-fn")
    if args.dataset and args.input_shape or args.image_size and not args.dataset:
        parser.error(
            "the shape of images comes from --dataset, with --image-size, or --input-shape"
        )
    if args.model_fn is None and args.masks is None:
        parser.error("--masks is needed: the masks folder of the source, from prune_imp.py")
    if args.model_fn and needs_images and args.dataset is None:
        parser.error(f"--method {args.method} looks at images: name them with --dataset")


def load_runs(
    source_run: Path,
    target_run: Path,
    masks_folder: Path,
    target_epoch: int | None,
    data_dir: str | None,
    device: torch.device,
    workers: int,
) -> Inputs:
    """Runs of stage 1 and masks of stage 2; raises UserError when they do not fit together."""
    source = checkpoint.load_dense(source_run)
    target = checkpoint.load_dense(target_run, target_epoch)
    if source["model"] != target["model"]:
        differ = f"source and target differ: {source['model']} and {target['model']}"
        raise UserError(f"{differ}: train both with the same --model, --width and image size")
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
    """State dicts and masks, ours or of torch.nn.utils.prune, by default in the source's file."""
    networks, images = [build(model_fn), build(model_fn)], None
    if dataset:
        wanted = {"name": dataset, "image_size": image_size}
        images = load_data(wanted, data_dir, device, workers)
    shape = list(images.input_shape) if images else input_shape or [3, 32, 32]
    source, target = (
        load_weights(path, model_fn, network, shape)
        for path, network in zip((source_file, target_file), networks)
    )
    masks = load_masks(masks_path or source_file, source, networks[0])
    return source, target, masks, networks, lambda: images


def free_axes(network: nn.Module, input_shape: list[int]) -> Axes:
    """The axes of a network; raises UserError, with the reasons, when nothing in it may move."""
    axes = find_axes(network, input_shape)
    if not axes.sizes:
        reasons = "; ".join(f"{axis}: {reason}" for axis, (_, reason) in axes.pinned.items())
        raise UserError(f"nothing in this network may be permuted ({reasons})")
    return axes


def build(name: str) -> nn.Module:
    """The module that the function `package.module:function` makes, in the working directory too.

    Raises UserError when there is no such function, or it makes no module without arguments.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        where = "write it as package.module:function"
        raise UserError(f"--model-fn {name}: {error}; {where}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"--model-fn {name} made a {type(made).__name__}, not a torch.nn.Module")
    if isinstance(made, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        kind = type(made).__name__
        raise UserError(f"--model-fn {name} made a {kind}: return its .module, and save that one's")
    return made


def _read(path: Path) -> tuple[dict[str, Tensor], masking.Mask]:
    """Weights and mask of a state dict, or of the one under the key `state_dict`."""
    content = checkpoint.load(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not _tensors(content):
        held = f" (it holds {shorten(', '.join(map(str, content)), 80)})" if content else ""
        raise UserError(f"{path} is no state dict: save model.state_dict(){held}")
    return masking.from_prune({name: value.detach() for name, value in content.items()})


def _tensors(content: Any) -> bool:
    """Whether this is a dict of tensors."""
    entries = content.values() if isinstance(content, dict) else [None]
    return all(isinstance(entry, Tensor) for entry in entries)


def load_weights(path: Path, name: str, model: nn.Module, input_shape: list[int]) -> Entry:
    """Read a state dict as `checkpoint.load_dense` would give it; the seed is the file's name.

    A network pruned by torch.nn.utils.prune is read as what it computes. Raises UserError when the
    weights do not fit `model`, which the function `name` built.
    """
    weights, _ = _read(path)
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    check_fits(weights, model, path, name)
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"the weights of {path} are not finite")
    about = {"model": {"name": name, "input_shape": input_shape}, "dataset": None}
    about |= {"seed": path.stem, "epoch": None, "sha256": checkpoint.digest(path)}
    return about | {"state_dict": weights}


def load_masks(path: Path, source: Entry, model: nn.Module) -> dict[str, Entry]:
    """Masks of the source by the file name that each gets.

    From a folder of mask_*.pt, which need no more than `mask`, or a single state dict in the form
    of torch.nn.utils.prune. Raises UserError when there is no mask, or one does not fit.
    """
    if path.is_dir():
        files = paths.mask_files(path)
        found = {file: checkpoint.load(file, ("mask",))["mask"] for file in files}
    else:
        found = {path: mask} if (mask := _read(path)[1]) else {}
    if not found:
        wanted = "a folder of mask_*.pt, or a state dict with weight_mask entries"
        raise UserError(f"no masks in {path}: give by --masks {wanted}, as before prune.remove")
    masks = {}
    for file, mask in found.items():
        if not mask or not _tensors(mask):
            wanted = "`mask` must name a bool tensor for each pruned weight"
            raise UserError(f"{file} holds no mask: {wanted}")
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
    """The training images that are matched on, in batches; the defaults depend on the data set."""
    streamed = isinstance(data, Streamed)
    limits = batch_size or MATCH_BATCH[streamed], count or MATCH_IMAGES[streamed]
    for images, _ in data.eval_batches("train", *limits):
        yield images


def not_permuted(masks: dict[str, Entry], out: Path) -> dict[str, Entry]:
    """The masks that have no permuted one in `out`; a UserError when one is of another mask."""
    missing = {}
    for name, mask in masks.items():
        if not (out / name).is_file():
            missing[name] = mask
        elif checkpoint.load(out / name, ("unpermuted",))["unpermuted"] != mask["unpermuted"]:
            raise UserError(f"{out / name} is a permutation of another mask: choose another --out")
    return missing


def reusable(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The permutation at `path`, None where there is none; a UserError when not `about` this."""
    if not path.is_file():
        return None
    found = checkpoint.load(path, ("permutation", "objective", "rows"))
    for key in ("source", "target", "unpermuted", "matching"):
        if found.get(key) != about[key]:
            made_by = "by other matching code" if key == "matching" else f"of another {key}"
            then_and_now = f"{found.get(key)} then, {about[key]} now"
            raise UserError(f"{path} was made {made_by} ({then_and_now}): choose another --out")
    return found
