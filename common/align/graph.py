"""A network as its ATen graph, from torch.export, which runs with any state dict as its input."""

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
    """A forward pass in ATen operators; `inputs` names its parameters and buffers, holds its
    constants, and is None for the images.
    """

    module: fx.GraphModule
    inputs: list[str | Tensor | None]

    def start(self, state: dict[str, Tensor], images: Tensor) -> fx.Interpreter:
        """A forward pass with these parameters and buffers, at its beginning."""
        run, known = fx.Interpreter(self.module), {**state, None: images}
        values = [one if isinstance(one, Tensor) else known[one] for one in self.inputs]
        run.args_iter = iter([x.to(images.dtype) if x.is_floating_point() else x for x in values])
        return run


def lockstep(runs: list[fx.Interpreter]) -> Iterator[tuple[fx.Node, ...]]:
    """Advance forward passes of one network node by node, so that no more activations are alive
    than they need; yields the node of each, whose value is in its `env`.
    """
    for nodes in zip(*(run.module.graph.nodes for run in runs)):
        for run, node in zip(runs, nodes):
            run.env[node] = run.run_node(node)
        yield nodes
        for run, node in zip(runs, nodes):
            for dead in run.user_to_last_uses.get(node, ()):
                del run.env[dead]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then the modes that the modules had."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def export(model: nn.Module, shape: Iterable[int]) -> Graph:
    """The graph of `model` in evaluation mode for images of `shape`, batch dimension included.

    Raises UserError when torch.export cannot follow the forward pass.
    """
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    images = torch.empty(*shape, device=first.device, dtype=first.dtype)
    logging.disable()  # torch logs and prints pages about an error, which is told in a line below
    try:
        # The device is for tensors that the forward pass makes itself.
        silent = contextlib.redirect_stderr(io.StringIO())
        with silent, torch.device(first.device), evaluation_mode(model):
            program = torch.export.export(model, (images,), strict=False)
    except Exception as error:  # of many kinds, from anywhere in the model's forward
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.export cannot follow {type(model).__name__}: {line}") from error
    finally:
        logging.disable(logging.NOTSET)
    names, constants = {*model.state_dict()}, program.constants
    targets = [one.target for one in program.graph_signature.input_specs]
    inputs = [constants.get(one, one if one in names else None) for one in targets]
    return Graph(program.graph_module, inputs)


def location(node: fx.Node) -> str:
    """What a node calls, in which layer, and at which line."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    *_, (layer, kind) = [("", ""), *node.meta.get("nn_module_stack", {}).values()]
    kind = str(kind).rpartition(".")[2]
    lines = re.findall(r'File ".*?([^/"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    inside = [kind] * bool(kind) + ["{}:{}".format(*line) for line in lines[-1:]]
    return f"{name} in {layer or 'the network itself'} ({', '.join(inside)})".replace(" ()", "")
