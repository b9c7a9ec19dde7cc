"""Exports a network to a graph of ATen operators that runs with any of its state dicts."""

import contextlib
import io
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from common.errors import UserError


class Graph(NamedTuple):
    """A forward pass in ATen operators.

    inputs: for each placeholder the name of a parameter or buffer, a constant, or None for the
    images.
    """

    module: fx.GraphModule
    inputs: list[str | Tensor | None]

    def start(self, state: dict[str, Tensor], images: Tensor) -> fx.Interpreter:
        """An interpreter at the first node, for these parameters, buffers and images."""
        interpreter, named = fx.Interpreter(self.module), {**state, None: images}
        values = [key if isinstance(key, Tensor) else named[key] for key in self.inputs]
        values = [x.to(images.dtype) if x.is_floating_point() else x for x in values]
        interpreter.args_iter = iter(values)
        return interpreter


def lockstep(runs: list[fx.Interpreter]) -> Iterator[tuple[fx.Node, ...]]:
    """Run several forward passes of one network node by node, and yield the node of each, whose
    value is in the interpreter's `env`. Frees every value after its last use.
    """
    for nodes in zip(*(run.module.graph.nodes for run in runs)):
        for run, node in zip(runs, nodes):
            run.env[node] = run.run_node(node)
        yield nodes
        for run, node in zip(runs, nodes):
            for unused in run.user_to_last_uses.get(node, ()):
                del run.env[unused]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def export(model: nn.Module, shape: Iterable[int]) -> Graph:
    """Export `model` in evaluation mode for images of `shape`, batch dimension included.

    Raises UserError when torch.export cannot follow the forward pass.
    """
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    images = torch.empty(*shape, device=first.device, dtype=first.dtype)
    logging.disable()  # torch logs and prints pages about an error, of which one line is raised
    try:
        # The device of tensors that the forward pass creates.
        silent = contextlib.redirect_stderr(io.StringIO())
        with silent, torch.device(first.device), evaluation_mode(model):
            program = torch.export.export(model, (images,), strict=False)
    except Exception as error:  # the model's forward may raise anything
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.export cannot follow {type(model).__name__}: {line}") from error
    finally:
        logging.disable(logging.NOTSET)
    names, constants = {*model.state_dict()}, program.constants
    targets = [spec.target for spec in program.graph_signature.input_specs]
    inputs = [constants.get(name, name if name in names else None) for name in targets]
    return Graph(program.graph_module, inputs)


def location(node: fx.Node) -> str:
    """The operator of a node, the module that calls it, and the line of code."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    *_, (layer, kind) = [("", ""), *node.meta.get("nn_module_stack", {}).values()]
    kind = str(kind).rpartition(".")[2]
    lines = re.findall(r'File ".*?([^/"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    details = [kind] * bool(kind) + ["{}:{}".format(*line) for line in lines[-1:]]
    return f"{name} in {layer or 'the network itself'} ({', '.join(details)})".replace(" ()", "")
