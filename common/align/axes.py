"""Finding the permutation axes of a network: which channels move together, read off its ATen graph.

1. Every index along every dimension of a parameter or buffer is a channel of its own (Walk.read).
2. The graph runs on tensors without content, and what each operator does to channels says one table
   (common/align/labels.py): which are the same, which form a block whose inner order is free, and
   which must stay in order. PyTorch takes all other operators apart until they are of those in the
   table; one that it cannot take apart pins what it reads, with the reason.
3. Channels that are the same make a class. Classes to which the same happens everywhere may trade
   places (settle): they are an axis, named after the first parameter along which it lies.

Take `fc(relu(conv(image)))`, with 8 filters and means over space. `conv.weight` has channels 0 to 7
along its first dimension and 8 to 10 along its second. The convolution sums over the second: there
they meet the image's colours, which nothing may move, so 8 to 10 are pinned. Its value has channels
0 to 7 along its second dimension, relu keeps them, and `fc`, which sums over them, ties them to the
8 channels along the second dimension of `fc.weight`. So there are 8 classes of two channels, alike
but for the index: the axis `conv` lies along `conv.weight`'s first and `fc.weight`'s second
dimension. The channels along `fc.weight`'s first dimension are the output, and pinned.
"""

import re

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from common.align.graph import Graph, export, where
from common.align.labels import META, Labels, along, core, is_pointwise, labels, only
from common.align.permutation import Axes, BlockGroup, Place


def find_axes(model: nn.Module, input_shape: tuple[int, ...]) -> Axes:
    """Derive the axes of `model` for inputs of `input_shape` (without the batch dimension).

    Raises UserError when torch.export cannot follow the forward pass.
    """
    walk = Walk(export(model, (2, *input_shape)))
    channels, classes = settle(walk.known)
    sizes, groups, pinned = name_axes(walk, channels, classes)
    names, (axis, rank) = [*sizes], classes.loc[channels["class"], ["axis", "rank"]].to_numpy().T

    def places(tensor: str, label: Tensor) -> list[Place]:
        """Where along a label axes are as a whole."""
        label, found = core(label), []
        here = walk.known.columns.get(int(label.flatten()[0]), label).flatten().numpy()
        for number in sorted({*axis[here].tolist()} - {-1}):
            at = np.flatnonzero(axis[here] == number)
            at = at[np.argsort(rank[here[at]], kind="stable")]
            many = np.bincount(rank[here[at]], minlength=sizes[names[number]])
            if (many == many[0]).all() and len(along(label)) == 1:
                about = names[number], torch.from_numpy(at).view(len(many), -1)
                found.append(Place(tensor, *along(label), *about, len(here) // label.numel()))
        return found

    state = model.state_dict(keep_vars=True)
    used = {id(state[name]): name for name in walk.parameters}  # one name of what is tied
    tensors = {name: walk.parameters.get(used.get(id(value))) for name, value in state.items()}
    dims = {
        name: [place for label in labels(tensor) for place in places(name, label)]
        for name, tensor in tensors.items()
    }
    weights = tuple(name for name, value in state.items() if used.get(id(value)) in walk.weights)
    readouts: dict[str, list[Place]] = {name: [] for name in names}
    before: dict[str, str] = {}
    for node, value in walk.run.env.items():
        inputs = node.all_input_nodes
        activation = is_pointwise(node) and (len(inputs) == 1 or "prelu" in node.name)
        # What pads channels puts them elsewhere.
        activation = activation and extents(value) == extents(walk.run.env[inputs[0]])
        before[node.name] = before[inputs[0].name] if activation else node.name
        made = is_pointwise(node) or node in walk.contractions
        if made and not all(map(is_pointwise, node.users)):
            for place in (place for label in labels(value) for place in places(node.name, label)):
                readouts[place.axis].append(place)
    return Axes(dims, sizes, groups, readouts, before, pinned, weights)


def extents(x: Tensor) -> set[tuple[int, int]]:
    """The dimensions along which channels lie, and their sizes."""
    return {(dim, x.shape[dim]) for label in labels(x) for dim in along(label)}


class Walk:
    """Runs a network on tensors that carry labels, one operator after the other."""

    def __init__(self, graph: Graph) -> None:
        self.known = Labels()
        self.parameters: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}  # of the vectors of channels along parameters
        self.run = fx.Interpreter(graph.module)
        self.contractions: set[fx.Node] = set()  # what multiplies matrices
        self.weights: set[str] = set()  # the parameters that it multiplies
        nodes, given = graph.module.graph.nodes, iter(graph.inputs)
        # Of what is computed from no image, the parameters that it is computed from.
        sources: dict[fx.Node, set[str] | None] = {}
        for node in nodes:
            if node.op == "placeholder":
                node.meta["given"] = one = next(given)
                sources[node] = None if one is None else {one} if isinstance(one, str) else set()
                continue
            for one in node.all_input_nodes:
                if one not in self.run.env:
                    self.run.env[one] = self.read(one.meta["given"], one.meta["val"])
            self.known.where, count = where(node), self.known.products
            with torch.inference_mode(), self.known:
                self.run.env[node] = self.run.run_node(node)
            before = [sources[one] for one in node.all_input_nodes]
            sources[node] = None if None in before else set().union(*before)
            if self.known.products > count:
                self.contractions.add(node)
                self.weights.update(*filter(None, before))
            if node.op == "output":
                for one in node.all_input_nodes:
                    self.known.pin(labels(self.run.env[one]), "is the output")

    def read(self, given: str | Tensor | None, value: Tensor) -> Tensor:
        """Every index along a parameter is a channel of its own, from where it is first read."""
        with torch.inference_mode():
            x = torch.empty(value.shape, dtype=value.dtype, device=META)
        if isinstance(given, Tensor) and not given.is_meta:
            same = [d for d in range(x.dim()) if (given == given.narrow(d, 0, 1)).all()]
            return self.known.give(x, [self.known.fresh(only({dim}, x.shape)) for dim in same])
        if not isinstance(given, str):
            return x
        large, found = along(x), []
        for dim in large:
            name = layer(given) if dim == 0 or len(large) == 1 else f"{given}.{dim}"
            self.names[len(self.known.starts) - 1] = name
            found.append(self.known.fresh(only({dim}, x.shape)))
        self.parameters[given] = self.known.give(x, found)
        return x


def layer(parameter: str) -> str:
    """What the first dimension of a parameter is called."""
    return re.sub(r"[._](parametrizations\.)?weight(_v|_orig|\.original\d*)?$", "", parameter)


# ---------------------------------------------------------------- what the walk has found


def components(count: int, *links: np.ndarray) -> np.ndarray:
    """The connected component of each of `count` nodes, from (2, n) arrays of their links."""
    ends = np.concatenate(links, 1)
    graph = coo_matrix((np.ones(ends.shape[1]), tuple(ends)), (count, count))
    return connected_components(graph, directed=False)[1]


def scramble(*columns: np.ndarray) -> np.ndarray:
    """A random-looking 64-bit number for every row of integers, the same for equal rows."""
    rows = pd.DataFrame(dict(enumerate(columns)))
    # A copy, because pandas 3 gives out arrays that are read-only.
    return pd.util.hash_pandas_object(rows, index=False).to_numpy(copy=True).view(np.int64)


def settle(known: Labels) -> tuple[pd.DataFrame, pd.DataFrame]:
    """For every channel its vector, the class of channels that are the same, and its unit, which is
    the block that it is in, or that class; and a table of the classes.

    reason: why it is pinned. colour: of one colour are those that may trade places. They may when
    every tie of one is a tie of the other, by the same operators: exchanging them, with all their
    entries in order, then takes ties to ties. holds: whether it is a block.
    """
    vector = np.repeat(np.arange(len(known.starts) - 1), np.diff(known.starts))
    ties, members = (torch.cat(rows, 1).numpy() for rows in (known.ties, known.members))
    # Beside every channel stands the block that it is in: blocks that share a channel are the same.
    inner = members + [[0], [len(vector)]]
    links = ties[:2], ties[:2] + len(vector), inner
    root, block = components(2 * len(vector), *links).reshape(2, -1)
    blocks, inside = root[members]
    unit = np.where(np.isin(block, blocks), block, root)
    nested = torch.from_numpy(members[1][np.isin(inside, blocks)])
    reason = np.full(block.max() + 1, None)
    for label, why in reversed([*known.pins, (nested, "its blocks are in larger blocks")]):
        reason[root[label.flatten().numpy()]] = why
    code = scramble(vector, pd.Series(vector).groupby([root, vector]).cumcount())
    colour = scramble(np.where(pd.isna(reason), -1, np.arange(len(reason))))
    np.add.at(colour, root, code)
    np.add.at(colour, root[ties[0]], scramble(code[ties[0]], code[ties[1]], ties[2]))
    # What is in a block tells it apart, and then the block what is in it.
    role = scramble(*code[members])
    np.add.at(colour, blocks, scramble(role, colour[inside]))
    np.add.at(colour, inside, scramble(role, colour[blocks]))
    holds = np.isin(np.arange(len(colour)), blocks)
    classes = {"reason": reason, "colour": colour, "holds": holds}
    return pd.DataFrame({"class": root, "vector": vector, "unit": unit}), pd.DataFrame(classes)


def name_axes(
    walk: Walk, channels: pd.DataFrame, classes: pd.DataFrame
) -> tuple[dict[str, int], tuple[BlockGroup, ...], dict[str, tuple[int, str]]]:
    """Sizes, groups and what is pinned, as in Axes; adds to `classes` the number of their axis,
    or -1, and their rank along it.
    """
    # A class is named after the parameter that is the first to have it.
    channels["name"] = channels["vector"].map(walk.names)
    channels["entries"] = channels.groupby(["class", "vector"])["name"].transform("size")
    live = channels.dropna().drop_duplicates("class").join(classes, on="class")
    live["front"] = live.index
    live["front"] = live.groupby("unit")["front"].transform("min")
    tied = (live["entries"] > 1) & ~live["colour"].duplicated(keep=False)
    live["reason"] = live["reason"].mask(tied & live["reason"].isna(), "it is tied to itself")
    stuck = live["reason"].notna()
    layers = [*map(layer, walk.weights)]
    pinned = {
        name: (int(rows["entries"].sum()), rows["reason"].iloc[0])
        for name, rows in live[stuck & live["name"].isin(layers)].groupby("name", sort=False)
    }
    classes["axis"], classes["rank"] = -1, 0
    sizes: dict[str, int] = {}
    groups: dict[int, tuple[list[str], int]] = {}
    for colour, same in live[~stuck].groupby("colour", sort=False):
        name, unit = same["name"].iloc[0], classes.loc[same["unit"].iloc[0]]
        while name in sizes:
            name = f"{name}.{len(sizes)}"
        order = same.sort_values("front", kind="stable")["class"]
        classes.loc[order, "axis"], classes.loc[order, "rank"] = len(sizes), np.arange(len(order))
        sizes[name], blocks = len(order), same["unit"].nunique() if unit["holds"] else 1
        # All axes that lie in the same blocks move with them.
        key = unit["colour"] if blocks > 1 else colour
        groups.setdefault(key, ([], blocks))[0].append(name)
    return sizes, tuple(BlockGroup(tuple(axes), blocks) for axes, blocks in groups.values()), pinned
