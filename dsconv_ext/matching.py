"""Find chains in the graphs of `tracing`."""

from __future__ import annotations

import operator

from torch import fx, nn

from . import layers
from .chains import Chain, Stage
from .layers import Step
from .tracing import IN_PLACE, Frame


class Link:
    """A `Chain` and the nodes of a graph it stands for."""

    def __init__(self, chain: Chain, nodes: list[fx.Node], addition: tuple[fx.Node, int] | None) -> None:
        self.chain = chain
        self.nodes = nodes
        self.addition = addition  # the node, and which of its arguments is the residual

    def frames(self) -> tuple[Frame, ...]:
        """The calls that contain all of it."""
        columns = zip(*(node.meta["frames"] for node in self.nodes), strict=False)  # some lie deeper than others
        return tuple(frames[0] for frames in columns if len(set(frames)) == 1)

    def substitute(self, graph: fx.Graph, target: str) -> None:
        """Call the submodule-like `target` in place of the nodes."""
        last = self.nodes[-1]
        arguments = [self.nodes[0].args[0]]
        if self.addition is not None:
            node, index = self.addition
            arguments.append(node.args[index])
        with graph.inserting_after(last):
            node = graph.create_node("call_module", target, tuple(arguments))
        last.replace_all_uses_with(node)
        for old in reversed(self.nodes):
            graph.erase_node(old)


class Finder:
    """Finds the chains of one graph.

    Parameters
    ----------
    graph : fx.Graph
        Made by `Tracer`.
    root : nn.Module
        What was traced.
    paths : dict of nn.Module to str
        Names of all modules, from the root of the whole model.
    fold, fuse
        Whether BatchNorms may be folded; `Chain`'s `fuse`.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, paths: dict[nn.Module, str], fold: bool, fuse: str) -> None:
        self.paths, self.fold, self.fuse = paths, fold, fuse
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.modules = {node: root.get_submodule(node.target) for node in self.nodes if node.op == "call_module"}
        self.taken: set[fx.Node] = set()
        self.reasons: dict[nn.Module, str] = {}

    def find(self) -> list[Link]:
        convs = [node for node, module in self.modules.items() if layers.rank(module) is not None]
        convs = [node for node in convs if self._operand(node) is not None]
        convs.sort(key=lambda node: not layers.is_depthwise(self.modules[node]))  # stable: depthwise first
        links = [self._link(node) for node in convs if node not in self.taken]
        return [link for link in links if link is not None]

    def _link(self, start: fx.Node) -> Link | None:
        conv = self.modules[start]
        walk = _Walk(self, start)
        stages = [walk.stage(with_addition=layers.is_pointwise(conv))]
        if layers.is_depthwise(conv):
            following = walk.peek()
            if following is None:
                self.reasons[conv] = walk.reason
            elif layers.rank(conv) != 3 and layers.is_pointwise(self.modules.get(following)):
                walk.take(following)
                stages.append(walk.stage(with_addition=True))
            else:
                self.reasons[conv] = f"{self._describe(following, start)} follows"
        if len(stages) == 1 and (stages[0].norm is None and stages[0].activation is None):
            return None
        nodes = walk.nodes[: walk.end]
        self.taken.update(nodes)
        chain = Chain(stages, walk.steps[: walk.end], self.paths, self.fuse)
        return Link(chain, nodes, walk.addition)

    def _operand(self, node: fx.Node) -> fx.Node | None:
        """The only argument of a module's call, if it is one tensor."""
        if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
            return node.args[0]
        return None

    def step(self, node: fx.Node) -> Step | None:
        """`node` as a `Step` on its first argument, if all others are constants."""
        if node in self.modules:
            return Step(self.modules[node]) if self._operand(node) is not None else None
        if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
            return None
        return Step(node.target, node.args[1:], dict(node.kwargs)) if node.args else None

    def is_disturbed(self, first: fx.Node, last: fx.Node, nodes: list[fx.Node]) -> fx.Node | None:
        """An operation in place between two nodes: what lies before it must not be computed after it."""
        between = self.nodes[self.position[first] + 1 : self.position[last]]
        return next((n for n in between if n not in nodes and self._writes(n)), None)

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[node]
            return any(getattr(m, "inplace", False) is True for m in module.modules())
        if node.op not in ("call_function", "call_method"):
            return False
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return (
            (name.endswith("_") and not name.endswith("__"))
            or node.target in (operator.setitem, *IN_PLACE)
            or "out" in node.kwargs
            or True in (node.kwargs.get("inplace"), *(a for a in node.args if isinstance(a, bool)))
        )

    def _describe(self, node: fx.Node, origin: fx.Node) -> str:
        """`node`, or the module with it inside that `origin` is not in."""
        outer = set(origin.meta["frames"])
        for frame in node.meta["frames"]:
            if frame not in outer and not any(frame.module is f.module for f in outer):
                return self._name(frame.module)
        if node in self.modules:
            return self._name(self.modules[node])
        if node.op == "output":
            return "the end of " + self._name(node.meta["frames"][0].module)
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

    def _name(self, module: nn.Module) -> str:
        return f"{type(module).__name__} {self.paths[module]}".rstrip()


class _Walk:
    """Follows the only use of each value from a convolution on, as far as that is a chain."""

    def __init__(self, finder: Finder, start: fx.Node) -> None:
        self.finder = finder
        self.nodes: list[fx.Node] = [start]
        self.steps: list[Step | None] = [Step(finder.modules[start])]
        self.end = 1  # what comes after is only passed through, such as a dropout
        self.addition: tuple[fx.Node, int] | None = None
        self.reason = ""

    def take(self, node: fx.Node, step: Step | None = None) -> None:
        self.nodes.append(node)
        self.steps.append(step or self.finder.step(node))
        self.end = len(self.nodes)

    def peek(self) -> fx.Node | None:
        """The next node, past dropouts and identities; None, with a `reason`, if the value has another use."""
        while True:
            last = self.nodes[-1]
            users = list(last.users)
            others = [user for user in users if user.op == "output"]
            if len(users) != 1 or others:
                names = {self.finder._describe(user, self.nodes[0]): None for user in users}
                self.reason = " and ".join(names) + (" follow" if len(names) > 1 else " follows")
                self.reason = self.reason if users else "its output is not used"
                return None
            node = users[0]
            if node in self.finder.taken:
                self.reason = f"{self.finder._describe(node, self.nodes[0])} belongs to another chain"
                return None
            if (writer := self.finder.is_disturbed(self.nodes[0], node, self.nodes)) is not None:
                self.reason = f"{self.finder._describe(writer, self.nodes[0])} works in place in between"
                return None
            module = self.finder.modules.get(node)
            if not (layers.is_dropout(module) or type(module) is nn.Identity) or self.finder.step(node) is None:
                return node
            self.nodes.append(node)
            self.steps.append(self.finder.step(node))

    def stage(self, with_addition: bool = False) -> Stage:
        """Take the norm, the residual and the activation that follow the convolution taken last."""
        conv = self.steps[-1].target  # type: ignore[union-attr]
        norm = act = None
        node = self.peek()
        if node is not None and self._is_foldable(conv, node):
            norm = self.finder.modules[node]
            self.take(node)
            node = self.peek()
        inner = Stage(conv, norm).spelled_activation()
        if not layers.is_depthwise(conv) and not with_addition:
            return Stage(conv, norm)  # PyTorch computes it, which has nothing to gain from taking its activation
        if with_addition and node is not None and inner == "none" and self._take_addition(node):
            node = self.peek()
        step = None if node is None or inner != "none" else self.finder.step(node)
        if node is not None and step is not None and layers.activation(step) not in (None, "none"):
            act = step
            self.take(node, step)
        return Stage(conv, norm, act)

    def _is_foldable(self, conv: nn.Module, node: fx.Node) -> bool:
        norm = self.finder.modules.get(node)
        if not self.finder.fold or not layers.is_batch_norm(norm) or self.finder.step(node) is None:
            return False
        return Stage(conv, norm).spelled_activation() is not None

    def _take_addition(self, node: fx.Node) -> bool:
        if node.target not in layers.ADDITIONS or node.kwargs or len(node.args) != 2:
            return False
        index = 1 if node.args[0] is self.nodes[-1] else 0
        residual = node.args[index]
        in_place = node.target in (operator.iadd, "add_")
        if not isinstance(residual, fx.Node) or residual is self.nodes[-1] or (in_place and index == 0):
            return False
        self.addition = node, index
        self.nodes.append(node)
        self.steps.append(None)
        self.end = len(self.nodes)
        return True
