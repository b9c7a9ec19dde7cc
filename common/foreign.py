"""Networks that these scripts did not train: a module of one's own, plain state dicts, and masks beside them."""

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common import checkpoint, masking
from common.errors import UserError


def build(name: str) -> nn.Module:
    """The module that the function `package.module:function` makes, looked up from the working directory too.

    Raises UserError when there is no such function, or it makes no module without arguments.
    """
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"--model-fn {name}: {error}; write it as package.module:function") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"--model-fn {name} made a {type(made).__name__}, not a torch.nn.Module")
    return made


def _read(path: Path) -> dict[str, Any]:
    """A state dict, or the one under the key `state_dict`; raises UserError for anything else."""
    content = checkpoint.load(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is no state dict: save model.state_dict()")
    return content


def load_weights(path: Path, name: str, model: nn.Module, input_shape: list[int]) -> dict[str, Any]:
    """Read a state dict, or one under the key `state_dict`, as `checkpoint.load_dense` would give it.

    A network pruned by torch.nn.utils.prune is read as what it computes. The seed is the file's name. Raises
    UserError when the weights do not fit `model`, which the function `name` built.
    """
    weights, _ = masking.from_prune(_read(path))
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    expected = model.state_dict()
    for key in expected.keys() | weights.keys():
        shapes = [
            tuple(state[key].shape) if isinstance(state.get(key), Tensor) else None for state in (weights, expected)
        ]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path} does not fit {name}: {key} is {shapes[0]} there and {shapes[1]} in the module")
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"the weights of {path} are not finite")
    about = {"model": {"name": name, "input_shape": input_shape}, "dataset": None, "seed": path.stem, "epoch": None}
    return about | {"state_dict": weights, "sha256": checkpoint.digest(path)}


def load_masks(path: Path, source: dict[str, Any], model: nn.Module) -> dict[str, dict[str, Any]]:
    """Read masks of the source by the file name that each gets: from a folder of mask_*.pt, or a pruned network.

    A file of the folder needs no more than `mask`; a single file is a state dict in the form of torch.nn.utils.prune.
    Raises UserError when there is no mask, or one does not fit.
    """
    if path.is_dir():
        found = {file: checkpoint.load(file, ("mask",))["mask"] for file in sorted(path.glob("mask_*.pt"))}
    else:
        _, mask = masking.from_prune(_read(path))
        found = {path: mask} if mask else {}
    if not found:
        raise UserError(f"no masks in {path}: give a folder of mask_*.pt, or a state dict with weight_mask entries")
    masks = {}
    for file, mask in found.items():
        if not isinstance(mask, dict) or not mask or not all(isinstance(entry, Tensor) for entry in mask.values()):
            raise UserError(f"{file} holds no mask: `mask` must name a bool tensor for each pruned weight")
        masking.check_fits(mask, source["state_dict"], file)
        sparsity = masking.sparsity(mask)
        name = file.name if path.is_dir() else checkpoint.mask_file(path, round(sparsity, 4)).name
        masks[name] = {
            "mask": mask, "signs": masking.signs(source["state_dict"], list(mask)), "sparsity": sparsity,
            "sparsity_total": masking.sparsity_total(mask, model), "model": source["model"], "dataset": source["dataset"],
            "source_seed": source["seed"], "target_seed": None, "method": None, "match_epoch": None,
            "unpermuted": checkpoint.digest(file),
        }  # fmt: skip
    return masks
