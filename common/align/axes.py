"""Finding the permutation axes of a network: which channels move together, read off its ATen graph.

torch.export lists the operators of a forward pass. Every index of every dimension of a parameter or
buffer is a channel of its own at first; walking the graph, RULES says for each operator which
channels are one and the same (`tie`), which only form a block whose order is free (`group`), and
which must stay where they are (`fix`, `pin`). Channels that appear everywhere in the same way may
trade places: they are an axis. An operator without a rule pins what it reads, with the reason.
"""

import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from common.align.permutation import Axes, BlockGroup, Layout, Readout
from common.errors import UserError

SLOT = 2**32  # a label is the channel, plus SLOT times the entry where a channel has several


class Graph(NamedTuple):
    """A forward pass in ATen operators; `inputs` names its parameters and buffers, holds its
    constants, and is None for the images.
    """

    module: fx.GraphModule
    inputs: list[str | Tensor | None]

    def start(self, state: dict[str, Tensor], images: Tensor) -> fx.Interpreter:
        """A forward pass of the network with these parameters and buffers, at its beginning."""
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


class Value(NamedTuple):
    """A tensor of the graph. Every label broadcasts to its shape, has size one along dimensions that
    it says nothing about, and names the channel that lies at each index of the others.
    """

    shape: tuple[int, ...]
    labels: tuple[Tensor, ...] = ()


def export(model: nn.Module, shape: Iterable[int]) -> Graph:
    """The graph of `model` in evaluation mode for images of `shape`, batch dimension included.

    Raises UserError when torch.export cannot follow the forward pass.
    """
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    images = torch.empty(*shape, device=first.device, dtype=first.dtype)
    training = [module for module in model.modules() if module.training]
    try:
        with torch.device(first.device):  # for tensors that the forward pass makes itself
            program = torch.export.export(model.eval(), (images,), strict=False)
    except Exception as error:  # of many kinds, from anywhere in the model's forward
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"torch.export cannot follow {type(model).__name__}: {line}") from error
    finally:
        for module in training:
            module.training = True
    names = {*model.state_dict()}
    inputs = [
        program.constants.get(one.target, one.target if one.target in names else None)
        for one in program.graph_signature.input_specs
    ]
    return Graph(program.graph_module, inputs)


def find_axes(model: nn.Module, input_shape: tuple[int, ...]) -> Axes:
    """Derive the axes of `model` for inputs of `input_shape` (without the batch dimension).

    Raises UserError when torch.export cannot follow the forward pass.
    """
    walk = Walk()
    walk.run(export(model, (2, *input_shape)))
    return walk.solve(model.state_dict(keep_vars=True))


def along(label: Tensor) -> set[int]:
    """The dimensions that a label tells about."""
    return {dim for dim, size in enumerate(label.shape) if size > 1}


def uniform(label: Tensor) -> bool:
    """Whether a label says, by channel 0, that entries are all the same, as after `expand`."""
    return not (label % SLOT).any()


class Walk:
    """Follows channels through a graph, one operator after the other."""

    def __init__(self) -> None:
        self.starts = [0, 1]  # of each vector of channels that is made, and the end of the last
        self.edges: list[Tensor] = []  # (5, n): two channels, an entry of each, an index
        self.members: list[Tensor] = []  # (2, n): a block, a channel in it
        self.pins: list[tuple[Tensor, str]] = []
        self.parameters: dict[str, Value] = {}
        self.makers: dict[int, int] = {}  # vector -> position of the operator that computes it
        self.columns: dict[int, tuple[int, Tensor]] = {}  # of grouped convolutions, by vector
        self.env: dict[fx.Node, Any] = {}
        self.computed: list[fx.Node] = []  # made anew: pooling and reshaping only pass values on
        self.contractions: set[fx.Node] = set()  # of these, the ones that make channels
        self.pointwise: set[fx.Node] = set()  # of these, the ones that keep channels to themselves
        self.activations: set[fx.Node] = set()  # of these, the ones of a single value
        self.names: dict[int, str] = {}  # of the vectors that lie along a parameter

    # -- what rules are made of

    def fresh(self, shape: Iterable[int]) -> Tensor:
        """New channels."""
        shape = tuple(shape)
        self.starts.append(self.starts[-1] + math.prod(shape))
        return torch.arange(self.starts[-2], self.starts[-1]).view(shape)

    def tie(self, one: Tensor, other: Tensor, index: Tensor | int = 0) -> None:
        """Channels of two labels are the same, or at `index` parts of the same, entry by entry."""
        rows = one % SLOT, other % SLOT, one // SLOT, other // SLOT, torch.as_tensor(index)
        self.edges.append(torch.stack([row.flatten() for row in torch.broadcast_tensors(*rows)]))

    def tell(self, label: Tensor) -> None:
        """These channels, and no others, take part in something."""
        if not uniform(label):
            self.tie(label, label, self.fresh([1]))

    def pin(self, label: Tensor, why: str) -> None:
        if not uniform(label):
            self.pins.append((label % SLOT, f"{self.where} {why}"))

    def fix(self, label: Tensor, dims: Iterable[int], why: str) -> Tensor | None:
        """What is left of a label when the order along `dims` must stay."""
        dims = along(label) & set(dims)
        if dims == along(label) or dims and uniform(label):
            return self.pin(label, why)
        if not dims:
            return label
        whole = self.fresh(1 if dim in dims else size for dim, size in enumerate(label.shape))
        shape = [size if dim in dims else 1 for dim, size in enumerate(label.shape)]
        self.tie(whole, label, torch.arange(math.prod(shape)).view(shape))
        return whole

    def group(self, label: Tensor, dims: Iterable[int]) -> Tensor | None:
        """What is left of a label when the order along `dims` is free: blocks of channels."""
        dims = sorted(along(label) & set(dims))
        if not dims:
            return label
        if len(dims) == len(along(label)) or uniform(label):
            return self.tell(label)
        rows = label.movedim(dims, [*range(-len(dims), 0)]).flatten(-len(dims))
        kept = [1 if dim in dims else size for dim, size in enumerate(label.shape)]
        rows = rows.flatten(0, -2)
        slots = rows // SLOT
        if (slots != slots[:, :1]).any():
            return self.fix(label, dims, "mixes parts of its channels")
        channels, which = torch.unique((rows % SLOT).sort(1).values, dim=0, return_inverse=True)
        blocks = self.fresh([len(channels)])
        self.members.append(
            torch.stack([blocks[:, None].expand_as(channels), channels]).flatten(1)
        )
        return (blocks[which] + slots[:, 0] * SLOT).view(kept)

    def value(self, shape: Iterable[int], labels: Iterable[Tensor | None]) -> Value:
        """A value with these labels, without those that say less than another."""
        kept: list[Tensor] = []
        for label in sorted((x for x in labels if x is not None), key=lambda x: -len(along(x))):
            if label.numel() == 1:
                self.tell(label)
            elif not any(along(label) <= along(other) for other in kept):
                kept.append(label)
        return Value(tuple(shape), tuple(kept))

    def meet(self, *values: Any) -> Value:
        """Broadcast values and tie, entry by entry, what lies along the same dimensions."""
        return functools.reduce(self._meet, [x for x in values if isinstance(x, Value)])

    def _meet(self, x: Value, y: Value) -> Value:
        rank = max(len(x.shape), len(y.shape))
        pair = [lift(value, rank - len(value.shape)) for value in (x, y)]
        sides = []
        for one, other in (pair, pair[::-1]):
            same = set().union(*(along(label) for label in other.labels if uniform(label)))
            varies = {dim for dim, size in enumerate(other.shape) if size > 1} - same
            known = set().union(*map(along, other.labels))
            side: list[tuple[Tensor | None, Tensor | None]] = []
            for label in one.labels:
                shared, met = None, along(label) & varies
                if met and uniform(label):
                    label = None
                elif met:
                    shared = self.group(label, along(label) - met)
                    shared = self.fix(shared, met - known, "joins it with values of fixed order")
                    label = label if met < along(label) else shared
                side.append((label, shared))
            sides.append(side)
        for (_, a), (_, b) in itertools.product(*sides):
            both = along(a) & along(b) if a is not None and b is not None else ()
            if both:
                self.tie(self.group(a, along(a) - both), self.group(b, along(b) - both))
        shape = [max(sizes) for sizes in zip(*(value.shape for value in pair))]
        return self.value(shape, [label for label, _ in sides[0] + sides[1]])

    def reduce(self, x: Value, dims: Iterable[int], keepdim: bool = False) -> Value:
        """Take dimensions together in a way that does not look at their order."""
        dims = tuple(dim % len(x.shape) for dim in dims)
        labels = [self.group(label, dims) for label in x.labels]
        x = self.value([1 if d in dims else size for d, size in enumerate(x.shape)], labels)
        if keepdim:
            return x
        shape = [size for dim, size in enumerate(x.shape) if dim not in dims]
        return Value(tuple(shape), tuple(label.squeeze(dims) for label in x.labels))

    def mix(self, x: Value, dims: Iterable[int]) -> Value:
        """Every entry depends on all along `dims`, whatever their order."""
        self.reduce(x, dims)
        return x

    def slide(self, x: Value, dims: Iterable[int]) -> Value:
        """Neighbours along `dims` must stay neighbours."""
        dims = [dim % len(x.shape) for dim in dims]
        return self.value(x.shape, [self.fix(x_, dims, "slides over it") for x_ in x.labels])

    def einsum(self, equation: str, *values: Value) -> Value:
        """Sum of products, which is what every contraction is."""
        inputs, _, output = equation.replace(" ", "").partition("->")
        spelt = []
        for term, value in zip(inputs.split(","), values):
            free = len(value.shape) - len(term.replace("...", ""))
            spelt.append(term.replace("...", "ABCDEFGH"[8 - free :]))
        wide = max((re.sub("[^A-Z]", "", term) for term in spelt), key=len)
        output = output.replace("...", wide)
        order = output + "".join(sorted(set("".join(spelt)) - set(output)))
        aligned = []
        for term, value in zip(spelt, values):
            turn = [term.index(letter) for letter in order if letter in term]
            shape = [value.shape[term.index(x)] if x in term else 1 for x in order]
            labels = [
                label.permute(turn).reshape(
                    [label.shape[term.index(x)] if x in term else 1 for x in order]
                )
                for label in value.labels
            ]
            aligned.append(Value(tuple(shape), tuple(labels)))
        return self.reduce(self.meet(*aligned), range(len(output), len(order)))

    def reshape(self, x: Value, shape: Iterable[int]) -> Value:
        """Cut dimensions, or join them: what is joined to a channel becomes its entries."""
        shape = tuple(shape)
        ends = [set(itertools.accumulate(sizes, int.__mul__)) for sizes in (x.shape, shape)]
        cuts = ends[0] & ends[1]

        def stretches(sizes: tuple[int, ...]) -> list[int]:
            before = [1, *itertools.accumulate(sizes, int.__mul__)]
            return [sum(cut <= at for cut in cuts if cut > 1) for at in before[: len(sizes)]]

        old, new = stretches(x.shape), stretches(shape)
        labels, todo = [], sorted(x.labels, key=uniform)
        while todo:
            label = todo.pop(0)
            live = {old[dim] for dim in along(label)}
            for other in [other for other in todo if live & {old[dim] for dim in along(other)}]:
                self.pin(other, "joins dimensions")
                todo = [one for one in todo if one is not other]
            full = [size if at in live else 1 for size, at in zip(x.shape, old)]
            slots = [n if m == 1 else 1 for n, m in zip(full, label.shape)]
            entries = math.prod(slots)
            place = torch.arange(entries).view(slots)
            label = label % SLOT + SLOT * (label // SLOT * entries + place)
            label = label.expand(full).reshape(
                [size if at in live else 1 for size, at in zip(shape, new)]
            )
            labels.append(simplify(label))
        return self.value(shape, labels)

    def cat(self, values: list[Value], dim: int) -> Value:
        rank = len(values[0].shape)
        dim %= rank
        rest, pieces = [], []
        for value in values:
            one = [1 if d == dim else size for d, size in enumerate(value.shape)]
            rest.append(Value(tuple(one), tuple(x for x in value.labels if dim not in along(x))))
        common = self.meet(*rest)
        found = [[x for x in value.labels if dim in along(x)] for value in values]
        if any(found):
            kinds = {tuple(along(x) - {dim}) for labels in found for x in labels[:1]}
            for value, labels in zip(values, found):
                for label in labels[1:]:
                    self.pin(label, "joins dimensions")
                if labels and (len(kinds) > 1 or not all(found)):
                    others = set(range(rank)) - {dim}
                    labels = [self.fix(labels[0], others, "joins channels of fixed order")]
                if not labels or uniform(labels[0]):
                    plain_ = not labels
                    labels = [self.fresh(value.shape[dim] if d == dim else 1 for d in range(rank))]
                    if plain_:
                        self.pin(labels[0], "joins channels of fixed order")
                pieces.append(labels[0])
        shape = list(common.shape)
        shape[dim] = sum(value.shape[dim] for value in values)
        return self.value(shape, [*common.labels, *([torch.cat(pieces, dim)] if pieces else [])])

    def expand(self, x: Value, shape: Iterable[int]) -> Value:
        """Entries that are repeated may trade places."""
        shape = tuple(shape)
        x = lift(x, len(shape) - len(x.shape))
        wider = [dim for dim, size in enumerate(shape) if size > x.shape[dim]]
        new = [
            torch.zeros([shape[d] if d == dim else 1 for d in range(len(shape))], dtype=torch.int64)
            for dim in wider
        ]
        return self.value(shape, [*x.labels, *new])

    # -- the graph

    def run(self, graph: Graph) -> None:
        inputs = iter(graph.inputs)
        for position, node in enumerate(graph.module.graph.nodes):
            self.where = where(node)
            shapes = sizes(node.meta.get("val"))
            if node.op == "placeholder":
                name = next(inputs)
                known = isinstance(name, str) and node.users
                self.env[node] = self.parameter(name, shapes) if known else plain(shapes)
                if isinstance(name, Tensor) and not name.is_meta:
                    self.env[node] = constant(name)
            elif node.op == "output":
                fx.node.map_arg(node.args, lambda x: self.pin_all(self.env[x], "is the output"))
            elif node.op == "call_function":
                self.env[node] = self.call(node, shapes)
                if node in self.contractions:
                    self.note(position, node)
            else:
                self.env[node] = None

    def parameter(self, name: str, shape: tuple[int, ...]) -> Value:
        """Every index of every dimension is a channel of its own."""
        labels = []
        large = [dim for dim, size in enumerate(shape) if size > 1]
        for dim in large:
            layer = re.sub(r"[._](parametrizations\.)?weight(_v|_orig|\.original\d*)?$", "", name)
            unclear = dim and len(large) > 1
            self.names[len(self.starts) - 1] = f"{name}.{dim}" if unclear else layer or name
            labels.append(self.fresh(shape[d] if d == dim else 1 for d in range(len(shape))))
        self.parameters[name] = Value(shape, tuple(labels))
        return self.parameters[name]

    def note(self, position: int, node: fx.Node) -> None:
        """Which vectors of channels an operator makes: its value's, but not those of its input."""
        found = []
        for value in (self.env[node], self.env[node.all_input_nodes[0]]):
            ids = [(label % SLOT).flatten() for label in value.labels]
            ids = torch.cat([torch.empty(0, dtype=torch.int64), *ids]).numpy()
            found.append(set(np.searchsorted(self.starts, ids, "right").tolist()))
        for vector in found[0] - found[1]:
            self.makers.setdefault(vector - 1, position)

    def grouped(self, x: Value, weight: Value) -> Value:
        """The second dimension of a grouped convolution's weight stands for other channels in every
        group: note which, and leave it out.
        """
        inner = [label for label in weight.labels if along(label) == {2}]
        outer = [label for label in x.labels if along(label) == {1, 2}]
        if len(inner) != 1 or len(outer) != 1 or (outer[0] >= SLOT).any():
            return weight
        self.pin(inner[0], "differs from group to group")
        vector = int(np.searchsorted(self.starts, int(inner[0].min()), "right")) - 1
        if vector in self.columns:
            self.tie(self.columns[vector], outer[0])
        self.columns[vector] = outer[0]
        labels = tuple(label for label in weight.labels if along(label) != {2})
        return Value((*weight.shape[:2], 1), labels)

    def call(self, node: fx.Node, shapes: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.get)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if isinstance(node.target, torch._ops.OpOverload):
            name = node.target.name().partition("::")[2].partition(".")[0].rstrip("_")
            tagged = torch.Tag.pointwise in node.target.tags or torch.Tag.pointwise in getattr(
                getattr(torch.ops.aten, name, None), "default", node.target
            ).tags
            rule, table = RULE_OF.get(name, (pointwise, POINTWISE) if tagged else (None, None))
            if rule is not None:
                schema = [one.name for one in node.target._schema.arguments]
                given = {one.name: one.default_value for one in node.target._schema.arguments}
                given |= dict(zip(given, args)) | kwargs
                first, *_ = given
                rest = {key: value for key, value in given.items() if key != first}
                a = SimpleNamespace(**given)
                a.x, a.given, a.out, a.name = given[first], given, shapes, name
                a.apply = functools.partial(node.target, **rest)
                if table is CONTRACTIONS:
                    self.contractions.add(node)
                if table is not PASSING:
                    self.computed.append(node)
                if table is POINTWISE:
                    self.pointwise.add(node)
                    if len(node.all_input_nodes) == 1 or name == "prelu":
                        self.activations.add(node)
                return rule(self, a)
        self.pin_all((args, kwargs), "is in a fixed order")
        return plain(shapes)

    def pin_all(self, values: Any, why: str) -> None:
        if isinstance(values, Value):
            for label in values.labels:
                self.pin(label, why)
        elif isinstance(values, dict):
            self.pin_all([*values.values()], why)
        elif isinstance(values, (list, tuple)):
            for value in values:
                self.pin_all(value, why)

    # -- the axes

    def settle(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The channel that each label stands for; of every channel the block that it is in (or -1),
        why it is pinned (or -1), and its colour: those of one colour may trade places.

        Two channels may trade places when every tie of one is a tie of the other: then exchanging
        them, with all their entries in order, takes ties to ties.
        """
        for vector, label in self.columns.items():
            other = self.starts[vector : vector + 2]
            tied = torch.cat([edge[:2, edge[0] != edge[1]] for edge in self.edges], 1)
            if ((tied >= other[0]) & (tied < other[1])).any():
                self.pins.append((label % SLOT, "another operator reads its weights"))
        count = self.starts[-1]
        vector = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        edges = torch.cat([torch.empty(5, 0, dtype=torch.int64), *self.edges], 1).numpy()
        members = torch.cat([torch.empty(2, 0, dtype=torch.int64), *self.members], 1).numpy()
        links = edges[:2]
        while True:  # a channel is in one block, so blocks that share one are the same
            link = coo_matrix((np.ones(links.shape[1]), tuple(links)), (count, count))
            classes, root = connected_components(link, directed=False)
            first = np.unique(root, return_index=True)[1]
            channel, block = np.unique(root[members[::-1]], axis=1)
            again = np.flatnonzero(channel[1:] == channel[:-1])
            if not len(again):
                break
            links = np.concatenate([links, first[np.stack([block[again], block[again + 1]])]], 1)
        inside = np.full(classes, -1)
        inside[channel] = block
        reason = np.full(classes, -1)
        for position, (label, _) in reversed([*enumerate(self.pins)]):
            reason[root[label.flatten().numpy()]] = position
        reason[np.intersect1d(channel, block)] = len(self.pins)  # no blocks of blocks
        order = np.lexsort((vector, root))
        new = np.diff(root[order] * len(self.starts) + vector[order], prepend=-1) != 0
        entry = np.empty(count, np.int64)
        entry[order] = np.arange(count) - np.maximum.accumulate(np.where(new, np.arange(count), 0))
        code = scramble(vector, entry)
        colour = scramble(np.where(reason < 0, 0, 1 + np.arange(classes)))
        np.add.at(colour, root, code)
        np.add.at(colour, root[edges[0]], scramble(code[edges[0]], code[edges[1]], *edges[2:]))
        role, ends, before = scramble(*code[members]), root[members], 0
        while before < (before := len(np.unique(colour))):
            seen = colour.copy()
            for here, there in (ends, ends[::-1]):
                np.add.at(colour, here, scramble(role, seen[there]))
        return root, inside, reason, colour

    def solve(self, state: dict[str, Tensor]) -> Axes:
        """Which channels may trade places, and where they lie."""
        root, inside, reason, colour = self.settle()
        vector = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        # Channels stand in the order in which operators make them; what no parameter has is left.
        made = np.array([self.makers.get(v, len(self.env)) for v in range(len(self.starts) - 1)])
        made[[v not in self.names for v in range(len(made))]] = len(self.env) + 1
        order = np.argsort(made[vector], kind="stable")
        lead = np.unique(root[order], return_index=True)[1]
        source = vector[order[lead]]
        width = np.bincount(root[vector == source[root]], minlength=len(lead))
        held = np.flatnonzero(inside >= 0)
        blocks = {*inside[held].tolist()}
        front = np.full(len(lead), len(root))
        np.minimum.at(front, inside[held], lead[held])
        front = np.where(inside >= 0, front[inside], lead)
        alike: dict[int, list[int]] = {}
        for one in np.argsort(lead).tolist():
            if made[source[one]] <= len(self.env):
                alike.setdefault(int(colour[one]), []).append(one)
        number, rank = np.full(len(lead), -1), np.zeros(len(lead), np.int64)
        sizes: dict[str, int] = {}
        pinned: dict[str, tuple[int, str]] = {}
        groups: dict[Any, tuple[list[str], int]] = {}
        reasons = [*(why for _, why in self.pins), "blocks of it are parts of larger blocks"]
        for same in alike.values():
            one = same[0]
            name = self.names[source[one]]
            if reason[one] >= 0 or width[one] > 1 == len(same):
                if source[one] in self.makers:
                    why = reasons[reason[one]] if reason[one] >= 0 else "its channels are tied"
                    many, why = pinned.get(name, (0, why))
                    pinned[name] = many + int(width[one]), why
                continue
            more = (f"{name}.{part}" for part in itertools.count(1))
            name = next(free for free in itertools.chain([name], more) if free not in sizes)
            same = sorted(same, key=lambda one: (front[one], lead[one]))
            number[same], rank[same] = len(sizes), np.arange(len(same))
            sizes[name] = len(same)
            count = len(set(inside[same].tolist()))
            if inside[one] >= 0 and count > 1:
                key = int(colour[inside[one]])
            else:
                key, count = int(colour[one]), len(same) if one in blocks else 1
            groups.setdefault(key, ([], count))[0].append(name)
        names = [*sizes]

        def places(label: Tensor) -> dict[str, Tensor]:
            """The positions along a label of the channels of every axis that is in it whole."""
            channels = root[(label % SLOT).flatten().numpy()]
            found = {}
            for axis in sorted(set(number[channels].tolist()) - {-1}):
                at = np.flatnonzero(number[channels] == axis)
                at = at[np.argsort(rank[channels[at]], kind="stable")]
                many = np.bincount(rank[channels[at]], minlength=sizes[names[axis]])
                if (many == many[0]).all():
                    found[names[axis]] = torch.from_numpy(at).view(len(many), -1)
            return found

        by_tensor = {id(value): name for name, value in state.items() if name in self.parameters}
        dims = {}
        for name, value in state.items():
            layouts: list[Layout | None] = [None] * value.dim()
            known = self.parameters.get(by_tensor.get(id(value), name), Value(()))
            for label in known.labels:
                (dim,) = along(label)
                label = self.columns.get(int(vector[label.flatten()[0]]), label)
                found = places(label)
                layouts[dim] = Layout(label.numel(), found) if found else None
            dims[name] = tuple(layouts)
        readouts: dict[str, list[Readout]] = {name: [] for name in names}
        for node in self.computed:
            if all(user in self.pointwise for user in node.users):
                continue
            before = node
            while before in self.activations:
                before = before.all_input_nodes[0]
            for label in self.env[node].labels if isinstance(self.env[node], Value) else ():
                if len(along(label)) == 1:
                    for axis, at in places(label).items():
                        readouts[axis].append(Readout(node.name, before.name, *along(label), at))
        return Axes(
            dims,
            sizes,
            tuple(BlockGroup(tuple(axes), count) for axes, count in groups.values()),
            {axis: tuple(several) for axis, several in readouts.items()},
            pinned,
        )


def scramble(*columns: np.ndarray) -> np.ndarray:
    """A random-looking 64-bit number for every row of integers, the same for equal rows."""
    mixed = np.zeros(1, np.uint64)
    for column in columns:
        mixed = mixed + column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def lift(value: Value, more: int) -> Value:
    """A value with dimensions of size one in front."""
    labels = (label[(None,) * more] for label in value.labels)
    return Value((1,) * more + value.shape, tuple(labels))


def simplify(label: Tensor) -> Tensor:
    """Say nothing about dimensions along which only the entries of channels vary."""
    channels, slots = label % SLOT, label // SLOT
    lone = channels
    for dim in along(label):
        if (channels == channels.narrow(dim, 0, 1)).all():
            lone = lone.narrow(dim, 0, 1)
        else:
            slots = slots.narrow(dim, 0, 1)
    return lone if (label // SLOT == slots).all() and label.any() else label


def sizes(value: Any) -> Any:
    """The shapes of a node's output."""
    if isinstance(value, (list, tuple)):
        return [sizes(one) for one in value]
    return tuple(value.shape) if isinstance(value, Tensor) else None


def plain(shapes: Any) -> Any:
    """Values along which nothing may move."""
    return [plain(one) for one in shapes] if isinstance(shapes, list) else shapes and Value(shapes)


def constant(value: Tensor) -> Value:
    """A value that no permutation reaches, as a filter that is the same for every channel."""
    labels = []
    for dim, size in enumerate(value.shape):
        if size > 1 and torch.equal(value, value.narrow(dim, 0, 1).expand_as(value)):
            labels.append(torch.zeros([size if d == dim else 1 for d in range(value.dim())], dtype=torch.int64))
    return Value(tuple(value.shape), tuple(labels))


def where(node: fx.Node) -> str:
    """What a node calls, in which layer, and at which line."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    *_, (layer, kind) = [("", ""), *node.meta.get("nn_module_stack", {}).values()]
    kind = kind if isinstance(kind, str) else kind.__name__
    lines = re.findall(r'File ".*?([^/"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    line = ", {}:{}".format(*lines[-1]) if lines else ""
    return f"{name} in {layer or 'the network itself'} ({kind.rpartition('.')[2]}{line})"


# ---------------------------------------------------------------- rules


def along_dims(walk: Walk, a: Any) -> Any:
    """What picks or moves whole slices along `dim` does the same to labels."""
    dims = a.given.get("dim", a.given.get("dims"))
    dims = {dim % len(a.x.shape) for dim in (dims if isinstance(dims, list) else [dims])}
    results: list[list[Tensor]] = [[] for _ in (a.out if isinstance(a.out, list) else [0])]
    for label in a.x.labels:
        wide = [size if dim in dims else -1 for dim, size in enumerate(a.x.shape)]
        done = a.apply(label.expand(wide))
        for labels, one in zip(results, done if isinstance(a.out, list) else [done]):
            for dim in dims - along(label) if one.dim() == label.dim() else ():
                one = one.narrow(dim, 0, 1)
            labels.append(one)
    if not isinstance(a.out, list):
        return walk.value(a.out, results[0])
    return [walk.value(*pair) for pair in zip(a.out, results)]


def repeat(walk: Walk, a: Any) -> Value:
    x = lift(a.x, len(a.out) - len(a.x.shape))
    tiled = [
        label.repeat([n if dim in along(label) else 1 for dim, n in enumerate(a.repeats)])
        for label in x.labels
    ]
    once = [n if size == 1 else size * n for size, n in zip(x.shape, a.repeats)]
    single = [1 if size == 1 else n for size, n in zip(x.shape, once)]
    return walk.expand(walk.value(single, tiled), a.out)


def pad(walk: Walk, a: Any) -> Value:
    """Entries of a constant are interchangeable: channels of their own before and behind."""
    rank, labels = len(a.out), []
    for label in a.x.labels:
        for back in range(1, len(a.pad) // 2 + 1):
            before, behind = a.pad[2 * back - 2 : 2 * back]
            if label is None or label.shape[-back] == 1 or not (before or behind):
                continue
            if a.given.get("mode", "constant") != "constant" or min(before, behind) < 0:
                label = walk.fix(label, [rank - back], "repeats or cuts a part of it")
                continue
            label = walk.fix(label, set(range(rank)) - {rank - back}, "joins it with a constant")
            ends = walk.fresh(before + behind if d == rank - back else 1 for d in range(rank))
            first, last = ends.split([before, behind], -back)
            label = torch.cat([first, label, last], -back)
        labels.append(label)
    return walk.value(a.out, labels)


def index(walk: Walk, a: Any) -> Value:
    """Entries that are looked up by their number keep it; a table's are its rows."""
    table, indices = a.given.get("weight", a.x), a.indices
    indices = indices if isinstance(indices, list) else [indices]
    walk.pin_all(indices, "looks up by it")
    dims = [dim for dim, one in enumerate(indices) if one is not None]
    if dims[-1] - dims[0] >= len(dims):
        walk.pin_all(table, "looks up parts of it")
        return Value(a.out)
    labels = [walk.fix(label, dims, "looks up parts of it") for label in table.labels]
    new = [1] * (len(a.out) - len(table.shape) + len(dims))
    first, last = dims[0], dims[-1] + 1
    shape = [(*x.shape[:first], *new, *x.shape[last:]) for x in labels if x is not None]
    return walk.value(a.out, [x.view(s) for x, s in zip((x for x in labels if x is not None), shape)])


def scale(value: Value | None, rank: int) -> Value | None:
    """A number for every channel, as what is multiplied with a tensor of `rank` dimensions."""
    if value is None or not value.shape:
        return value
    shape = (1, -1, *[1] * (rank - 2))
    return Value((1, *value.shape, *shape[2:]), tuple(x.view(shape) for x in value.labels))


def by_channel(walk: Walk, a: Any) -> Value:
    """Batch and instance normalisation, PReLU: parameters along the second dimension."""
    names = ("weight", "bias", "running_mean", "running_var")
    return walk.meet(a.x, *(scale(a.given.get(name), len(a.out)) for name in names))


def group_norm(walk: Walk, a: Any) -> Value:
    n, channels, *rest = a.out
    blocks = walk.reshape(a.x, (n, a.num_groups, channels // a.num_groups, *rest))
    walk.mix(blocks, range(2, len(blocks.shape)))
    return by_channel(walk, a)


def layer_norm(walk: Walk, a: Any) -> Value:
    walk.mix(a.x, range(-len(a.normalized_shape), 0))
    return walk.meet(a.x, a.weight, a.given.get("bias"))


def softmax(walk: Walk, a: Any) -> Value:
    return walk.mix(a.x, [a.dim])


def pointwise(walk: Walk, a: Any) -> Value:
    given = [one for x in a.given.values() for one in (x if isinstance(x, list) else [x])]
    given = [one for one in given if isinstance(one, Value)]
    return walk.meet(*given) if given else plain(a.out)


def reduction(walk: Walk, a: Any) -> Value:
    dims = a.given.get("dim")
    dims = range(len(a.x.shape)) if dims in (None, []) else dims
    dims = [dims] if isinstance(dims, int) else dims
    return walk.reduce(a.x, dims, bool(a.given.get("keepdim")))


def slide(walk: Walk, a: Any) -> Any:
    """Pooling and resizing of the last dimensions, as many as the operator's name says."""
    dims = int(re.search(r"(\d)d", a.name)[1])
    x = walk.slide(a.x, range(-dims, 0))
    return [x._replace(shape=one) for one in a.out] if isinstance(a.out, list) else x._replace(shape=a.out)


def linear(walk: Walk, a: Any) -> Value:
    return walk.meet(walk.einsum("...i,oi->...o", a.x, a.weight), a.bias)


def matmul(walk: Walk, a: Any) -> Value:
    one, other = (value for value in a.given.values() if isinstance(value, Value))
    left = "...ik" if len(one.shape) > 1 else "k"
    right = "...kj" if len(other.shape) > 1 else "k"
    out = "..." + "i" * ("i" in left) + "j" * ("j" in right)
    return walk.einsum(f"{left},{right}->{out}", one, other)


def addmm(walk: Walk, a: Any) -> Value:
    return walk.meet(a.x, walk.einsum("...ik,...kj->...ij", *[*a.given.values()][1:3]))


def einsum(walk: Walk, a: Any) -> Value:
    return walk.einsum(a.equation, *a.tensors)


def attention(walk: Walk, a: Any) -> Value:
    scores = walk.einsum("...qd,...kd->...qk", a.query, a.key)
    scores = walk.mix(walk.meet(scores, a.attn_mask), [-1])
    return walk.einsum("...qk,...kd->...qd", scores, a.value)


def convolution(walk: Walk, a: Any) -> Value:
    transposed = "transpose" in a.name or a.given.get("transposed")
    flat = []
    for value in (a.x, a.weight):
        value = walk.slide(value, range(2, len(value.shape)))
        labels = (label.flatten(1) for label in value.labels)
        flat.append(Value(value.shape[:2], tuple(labels)))
    x, weight = flat
    x = walk.reshape(x, (x.shape[0], a.groups, x.shape[1] // a.groups))
    weight = walk.reshape(weight, (a.groups, weight.shape[0] // a.groups, weight.shape[1]))
    if a.groups > 1 and not transposed:
        weight = walk.grouped(x, weight)
    y = walk.einsum("ngi,gio->ngo" if transposed else "ngi,goi->ngo", x, weight)
    y = walk.reshape(y, a.out[:2])
    labels = tuple(label.view(*label.shape, *[1] * (len(a.out) - 2)) for label in y.labels)
    return walk.meet(Value(a.out, labels), scale(a.bias, len(a.out)))


def weight_norm(walk: Walk, a: Any) -> Value:
    walk.mix(a.v, set(range(len(a.v.shape))) - {a.dim})
    return walk.meet(a.v, a.g)


def stack(walk: Walk, a: Any) -> Value:
    shape = list(a.out)
    shape[a.dim] = 1
    return walk.cat([walk.reshape(x, shape) for x in a.tensors], a.dim)


def pixel_shuffle(walk: Walk, a: Any) -> Value:
    r, (n, c, h, w) = a.upscale_factor, a.x.shape
    x = walk.reshape(a.x, (n, c // r**2, r, r, h, w))
    turn = (0, 1, 4, 2, 5, 3)
    labels = tuple(label.permute(turn) for label in x.labels)
    return walk.reshape(Value((n, c // r**2, h, r, w, r), labels), a.out)


# Values made anew, by summing over channels.
CONTRACTIONS = {
    "linear": linear,
    "matmul mm bmm mv dot": matmul,
    "addmm baddbmm": addmm,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution": convolution,
}
# Values made anew, each channel from itself; and all operators that PyTorch tags as pointwise.
POINTWISE = {
    "batch_norm instance_norm prelu": by_channel,
    "group_norm": group_norm,
    "layer_norm rms_norm": layer_norm,
    "softmax log_softmax _softmax _log_softmax": softmax,
    "constant_pad_nd pad": pad,
    "dropout feature_dropout alpha_dropout feature_alpha_dropout contiguous to type_as alias "
    "detach copy fill zero _to_copy lift_fresh_copy log_sigmoid hardswish _assert_tensor_metadata": pointwise,
}
# Values passed on.
PASSING = {
    "view _unsafe_view reshape flatten unflatten squeeze unsqueeze view_as reshape_as": (
        lambda walk, a: walk.reshape(a.x, a.out)
    ),
    "permute transpose t swapaxes swapdims movedim numpy_T": (
        lambda walk, a: Value(a.out, tuple(map(a.apply, a.x.labels)))
    ),
    "slice select split split_with_sizes chunk unbind narrow flip roll": along_dims,
    "cat concat": lambda walk, a: walk.cat(a.tensors, a.dim),
    "stack": stack,
    "expand expand_as broadcast_to": lambda walk, a: walk.expand(a.x, a.out),
    "repeat": repeat,
    "index embedding": index,
    "pixel_shuffle": pixel_shuffle,
    "_weight_norm": weight_norm,
    "mean sum amax amin var std prod any all norm linalg_vector_norm logsumexp": reduction,
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d reflection_pad2d "
    "replication_pad2d": slide,
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty": (
        lambda walk, a: plain(a.out)
    ),
}
RULE_OF = {
    name: (rule, table)
    for table in (CONTRACTIONS, POINTWISE, PASSING)
    for names, rule in table.items()
    for name in names.split()
}
