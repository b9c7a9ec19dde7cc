"""Finds the permutation axes of a network, which are channels that move together, from its graph.

1. Every index along every dimension of a parameter or buffer starts as a channel of its own.
2. LabelPropagation runs the graph of ATen operators on meta tensors. The rules in
   common/align/labels.py say which channels an operator ties, groups into blocks or pins.
3. Tied channels form a class (find_classes). Classes that have the same ties everywhere can be
   exchanged, and form an axis, named after the first parameter along which it lies (name_axes).

Take `fc(relu(conv(image)))` with 8 filters and a mean over space before `fc`. `conv.weight` has
channels 0 to 7 along dimension 0 and 8 to 10 along dimension 1. The convolution sums over the
latter, which meet the colours of the image, whose order is fixed: 8 to 10 are pinned. Its output
has channels 0 to 7 along dimension 1, relu keeps them, and `fc`, which sums over them, ties them to
the 8 channels along dimension 1 of `fc.weight`. This makes 8 classes of two channels each that
differ in nothing but the index: the axis `conv`, along dimension 0 of `conv.weight` and dimension 1
of `fc.weight`. The channels along dimension 0 of `fc.weight` are the output, and pinned.
"""

import re

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from common.align.graph import Graph, export, location
from common.align.labels import (
    META,
    LabelMode,
    dims_of,
    is_pointwise,
    labels,
    shape_along,
    unexpand,
)
from common.align.permutation import Axes, BlockGroup, Place

COPIES = "clone contiguous to type_as _to_copy alias detach dropout feature_dropout alpha_dropout"
COPIES = {getattr(torch.ops.aten, name) for name in COPIES.split()}


def find_axes(model: nn.Module, input_shape: tuple[int, ...]) -> Axes:
    """Derive the axes of `model` for inputs of `input_shape` (without the batch dimension).

    Raises UserError when torch.export cannot follow the forward pass.
    """
    propagation = LabelPropagation(export(model, (2, *input_shape)))
    channels, classes = find_classes(propagation.mode)
    sizes, groups, pinned = name_axes(propagation, channels, classes)
    # The number of every channel's axis, or -1, and the channel's rank along it.
    axis, rank = classes.loc[channels["class"], ["axis", "rank"]].to_numpy().T
    names = [*sizes]

    def find_places(name: str, tensor: Tensor | None) -> list[Place]:
        """Where axes lie in a parameter or an activation with all their channels."""
        places = []
        for label in labels(tensor):
            if len(dims_of(label)) > 1:
                continue
            own = unexpand(label).flatten()
            along = propagation.mode.group_columns.get(int(own[0]), own).flatten().numpy()
            for number in sorted({*axis[along].tolist()} - {-1}):
                index = np.flatnonzero(axis[along] == number)
                index = index[np.argsort(rank[along[index]], kind="stable")]
                entries = np.bincount(rank[along[index]], minlength=sizes[names[number]])
                if (entries == entries[0]).all():
                    positions = torch.from_numpy(index).view(len(entries), -1)
                    where = *dims_of(label), names[number], positions
                    places.append(Place(name, *where, len(along) // len(own)))
        return places

    state = model.state_dict(keep_vars=True)
    # A shared parameter has several names in the state dict, and one of them in the graph.
    by_id = {id(state[name]): name for name in propagation.parameters}
    in_graph = {name: by_id.get(id(value)) for name, value in state.items()}
    dims = {name: find_places(name, propagation.parameters.get(in_graph[name])) for name in state}
    weights = tuple(name for name in state if in_graph[name] in propagation.weights)
    activations: dict[str, list[Place]] = {name: [] for name in names}
    computed: set[fx.Node] = set()
    for node, value in propagation.values.items():
        if (
            node in propagation.matmuls
            or is_pointwise(node)
            and (not copies_input(node) or node.all_input_nodes[0] in computed)
        ):
            computed.add(node)
        if node in computed and not all(map(is_pointwise, node.users)):
            for place in find_places(node.name, value):
                activations[place.axis].append(place)
    pre_activation = find_pre_activations(propagation.values)
    return Axes(dims, sizes, groups, activations, pre_activation, pinned, weights)


def copies_input(node: fx.Node) -> bool:
    """Whether a node's values are those of its input, in evaluation mode."""
    return getattr(node.target, "overloadpacket", None) in COPIES


def find_pre_activations(values: dict[fx.Node, Tensor]) -> dict[str, str]:
    """For every node the one ahead of the pointwise operators that lead to it, or itself."""
    pre_activation: dict[str, str] = {}
    for node, value in values.items():
        inputs = node.all_input_nodes
        nonlinear = is_pointwise(node) and (len(inputs) == 1 or "prelu" in node.name)
        # Not padding, which moves channels to other positions.
        nonlinear = nonlinear and labelled_shape(value) == labelled_shape(values[inputs[0]])
        pre_activation[node.name] = pre_activation[inputs[0].name] if nonlinear else node.name
    return pre_activation


def labelled_shape(x: Tensor) -> set[tuple[int, int]]:
    """The dimensions of a value that have a label, and their sizes."""
    return {(dim, x.shape[dim]) for label in labels(x) for dim in dims_of(label)}


class LabelPropagation:
    """Runs a graph on meta tensors with labels, as torch.fx's ShapeProp does for shapes."""

    def __init__(self, graph: Graph) -> None:
        self.mode = LabelMode()
        interpreter = fx.Interpreter(graph.module)
        self.values = interpreter.env  # of every node
        self.parameters: dict[str, Tensor] = {}  # with labels; also the buffers
        self.vector_names: dict[int, str] = {}  # of the vectors along parameters, by index
        self.matmuls: set[fx.Node] = set()  # nodes that multiply matrices or convolve
        self.weights: set[str] = set()  # the parameters that these nodes use
        inputs = iter(graph.inputs)
        # The parameters that a node's value is computed from; None if it depends on the images.
        sources: dict[fx.Node, set[str] | None] = {}
        for node in graph.module.graph.nodes:
            if node.op == "placeholder":
                node.meta["input"] = value = next(inputs)
                names = {value} if isinstance(value, str) else set()
                sources[node] = None if value is None else names
                continue
            for argument in node.all_input_nodes:
                if argument not in self.values:
                    meta = argument.meta
                    self.values[argument] = self.read(meta["input"], meta["val"])
            self.mode.location, num_matmuls = location(node), self.mode.num_matmuls
            with torch.inference_mode(), self.mode:
                self.values[node] = interpreter.run_node(node)
            operands = [sources[argument] for argument in node.all_input_nodes]
            sources[node] = None if None in operands else set().union(*operands)
            if self.mode.num_matmuls > num_matmuls:
                self.matmuls.add(node)
                self.weights.update(*filter(None, operands))
            if node.op == "output":
                for argument in node.all_input_nodes:
                    self.mode.pin(labels(self.values[argument]), "is the output")

    def read(self, source: str | Tensor | None, example: Tensor) -> Tensor:
        """Create a labelled meta tensor for an input of the graph; `source` is as in Graph.inputs.

        Every index along every dimension of a parameter is a new channel.
        """
        with torch.inference_mode():
            x = torch.empty(example.shape, dtype=example.dtype, device=META)
        if isinstance(source, Tensor) and not source.is_meta:
            # The order of a constant is free along dimensions along which it does not change.
            free = [d for d in range(x.dim()) if (source == source.narrow(d, 0, 1)).all()]
            new = [self.mode.new_channels(shape_along({dim}, x.shape)) for dim in free]
            return self.mode.set_labels(x, new)
        if not isinstance(source, str):
            return x
        dims, new = dims_of(x), []
        for dim in dims:
            name = layer_name(source) if dim == 0 or len(dims) == 1 else f"{source}.{dim}"
            self.vector_names[len(self.mode.offsets) - 1] = name
            new.append(self.mode.new_channels(shape_along({dim}, x.shape)))
        self.parameters[source] = self.mode.set_labels(x, new)
        return x


def layer_name(parameter: str) -> str:
    """The name of the channels along dimension 0 of a parameter: its layer's for a weight."""
    return re.sub(r"[._](parametrizations\.)?weight(_v|_orig|\.original\d*)?$", "", parameter)


# ---------------------------------------------------------------- classes of channels


def components(count: int, *edges: np.ndarray) -> np.ndarray:
    """The connected component of each of `count` nodes, from (2, n) arrays of edges."""
    ends = np.concatenate(edges, 1)
    graph = coo_matrix((np.ones(ends.shape[1]), tuple(ends)), (count, count))
    return connected_components(graph, directed=False)[1]


def hash_rows(*columns: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every row of integers."""
    rows = pd.DataFrame(dict(enumerate(columns)))
    # A copy, because pandas 3 returns read-only arrays.
    return pd.util.hash_pandas_object(rows, index=False).to_numpy(copy=True).view(np.int64)


def find_classes(mode: LabelMode) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the classes of tied channels; returns a table of channels and a table of classes.

    Channels have a vector, a class, and a unit: the class of their block, or their own. Classes
    have the reason for which they are pinned; whether they are blocks; and a colour, a hash of
    their ties with the tags, as in colour refinement (Weisfeiler and Leman 1968). Classes of one
    colour can be exchanged, with their entries in order: this takes all ties to ties.
    """
    vector = np.repeat(np.arange(len(mode.offsets) - 1), np.diff(mode.offsets))
    ties, members = (torch.cat(rows, 1).numpy() for rows in (mode.ties, mode.members))
    # Node i is channel i, and node len(vector) + i its block: ties of channels tie their blocks.
    membership = members + [[0], [len(vector)]]
    edges = ties[:2], ties[:2] + len(vector), membership
    class_of, block_of = components(2 * len(vector), *edges).reshape(2, -1)
    blocks, contents = class_of[members]
    is_block = np.isin(np.arange(block_of.max() + 1), blocks)
    unit = np.where(is_block[block_of], block_of, class_of)
    nested = torch.from_numpy(members[1][is_block[contents]])
    reasons = np.full(len(is_block), None)
    for label, reason in reversed([*mode.pins, (nested, "its blocks are in larger blocks")]):
        reasons[class_of[label.flatten().numpy()]] = reason
    # Identifies the entries of a class: by vector, and number among the entries in that vector.
    entry = hash_rows(vector, pd.Series(vector).groupby([class_of, vector]).cumcount())
    # Pinned classes have colours of their own.
    colour = hash_rows(np.where(pd.isna(reasons), -1, np.arange(len(reasons))))
    np.add.at(colour, class_of, entry)
    np.add.at(colour, class_of[ties[0]], hash_rows(entry[ties[0]], entry[ties[1]], ties[2]))
    # The colour of a block depends on those of its contents, and theirs then on the block's.
    role = hash_rows(*entry[members])
    np.add.at(colour, blocks, hash_rows(role, colour[contents]))
    np.add.at(colour, contents, hash_rows(role, colour[blocks]))
    classes = {"reason": reasons, "colour": colour, "is_block": is_block}
    return pd.DataFrame({"class": class_of, "vector": vector, "unit": unit}), pd.DataFrame(classes)


def name_axes(
    propagation: LabelPropagation, channels: pd.DataFrame, classes: pd.DataFrame
) -> tuple[dict[str, int], tuple[BlockGroup, ...], dict[str, tuple[int, str]]]:
    """Return `sizes`, `groups` and `pinned` of Axes.

    Adds to `classes` the number of their axis, or -1, and their rank along it.
    """
    channels["name"] = channels["vector"].map(propagation.vector_names)
    channels["entries"] = channels.groupby(["class", "vector"])["name"].transform("size")
    # A class is named after the first parameter in which it lies.
    named = channels.dropna().drop_duplicates("class").join(classes, on="class")
    named["first"] = named.index.to_series().groupby(named["unit"]).transform("min")
    alone = (named["entries"] > 1) & ~named["colour"].duplicated(keep=False)
    named["reason"] = named["reason"].mask(alone & named["reason"].isna(), "it is tied to itself")
    is_pinned = named["reason"].notna()
    layers = [*map(layer_name, propagation.weights)]
    pinned = {
        name: (int(rows["entries"].sum()), rows["reason"].iloc[0])
        for name, rows in named[is_pinned & named["name"].isin(layers)].groupby("name", sort=False)
    }
    classes["axis"], classes["rank"] = -1, 0
    sizes: dict[str, int] = {}
    groups: dict[int, tuple[list[str], int]] = {}
    for colour, rows in named[~is_pinned].groupby("colour", sort=False):
        name, unit = rows["name"].iloc[0], classes.loc[rows["unit"].iloc[0]]
        while name in sizes:
            name = f"{name}.{len(sizes)}"
        # Channels of a block lie next to each other along the axis.
        order = rows.sort_values("first", kind="stable")["class"]
        classes.loc[order, "axis"], classes.loc[order, "rank"] = len(sizes), np.arange(len(order))
        sizes[name], blocks = len(order), rows["unit"].nunique() if unit["is_block"] else 1
        # All axes in the same blocks move with them.
        key = unit["colour"] if blocks > 1 else colour
        groups.setdefault(key, ([], blocks))[0].append(name)
    return sizes, tuple(BlockGroup(tuple(axes), blocks) for axes, blocks in groups.values()), pinned
