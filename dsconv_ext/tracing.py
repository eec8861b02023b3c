"""Find chains in the graphs that torch.fx makes of a model's modules."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from . import layers
from .chains import Chain, Stage
from .layers import Step


class Untraceable(Exception):
    """A forward that a graph would not tell the truth about."""


# What a proxy answers differently from a tensor, and what differs from call to call without a trace in a graph.
_QUESTIONS = {"isinstance", "type", "hasattr", "is_grad_enabled", "is_autocast_enabled", "requires_grad", "is_tracing"}


@functools.cache
def _question(cls: type, method: str = "forward") -> str | None:
    """A question that the code of a method, or of one it calls, asks about its values or the state of torch."""
    code = getattr(inspect.unwrap(getattr(cls, method)), "__code__", None)
    names = () if code is None else code.co_names
    own = (n for n in names if n != method and not hasattr(nn.Module, n) and inspect.isfunction(getattr(cls, n, None)))
    found = [n for n in names if n in _QUESTIONS] + [q for n in own if (q := _question(cls, n)) is not None]
    return found[0] if found else None


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is; torch.fx makes ``x = x + y`` of it."""


_IN_PLACE = [getattr(operator, name) for name in operator.__all__ if name[0] == "i" and hasattr(operator, f"__{name}__")]


def _recorder(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in _IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _recorder(_function))


class Frame:
    """One call of a module while it was traced."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Tracer(fx.Tracer):
    """Records the calls of leaves, and inside of which calls of other modules each node lies (``meta["frames"]``).

    A module whose forward cannot be traced becomes a leaf. So does one whose forward does what a graph does not show:
    it writes attributes, or changes grad mode or autocast.

    Parameters
    ----------
    inlined : set of nn.Module, optional
        The only modules to look into; None looks into all that are not known.
    """

    def __init__(self, inlined: set[nn.Module] | None = None) -> None:
        super().__init__()
        self.inlined = inlined
        self.frames: list[Frame] = []
        self.failures: dict[nn.Module, str] = {}

    def trace_module(self, module: nn.Module) -> fx.Graph:
        """Trace the forward of `module`; raise `Untraceable` where that is not possible."""
        self.frames = [Frame(module)]
        try:
            with torch.enable_grad(), _autocast_refused(), _intact(module):
                _check(module)
                return self.trace(module)
        except Exception as error:  # whatever the code of a model raises when it meets a proxy
            self.failures[module] = _first_line(error)
            raise Untraceable(self.failures[module]) from error

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """One placeholder per required argument; the others keep their defaults."""
        names = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise Untraceable(f"its forward takes {parameter}")
            if parameter.default is parameter.empty:
                if parameter.kind is parameter.KEYWORD_ONLY:
                    raise Untraceable(f"its forward needs the keyword {parameter.name}")
                names.append(parameter.name)
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise Untraceable("its forward changes the grad mode")
        node = super().create_node(*args, **kwargs)
        node.meta["frames"] = tuple(self.frames)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = a in self.tensor_attrs or any(a is buffer for buffer in self.root.buffers())
            if not known:  # it would become an attribute of the model
                raise Untraceable("its forward makes a constant tensor")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.inlined is not None:
            return m not in self.inlined
        return (
            super().is_leaf_module(m, module_qualified_name)
            or "forward" in m.__dict__
            or isinstance(m, _ConvNd)
            or layers.is_batch_norm(m)
            or layers.is_dropout(m)
            or layers.activation(m) is not None
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        before, stack, calls = len(self.graph.nodes), self.module_stack.copy(), dict(self.num_calls)
        self.frames.append(Frame(m))
        try:
            with _intact(m):
                _check(m)
                return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.failures.setdefault(m, _first_line(error))
            self.module_stack, self.num_calls = stack, calls
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            if self.inlined is not None:
                raise
        finally:
            self.frames.pop()
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _check(module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise Untraceable("the instance has a forward of its own")
    if (question := _question(type(module))) is not None:
        raise Untraceable(f"its forward asks {question}")


@contextlib.contextmanager
def _autocast_refused() -> Iterator[None]:
    """Raise `Untraceable` where a forward enters autocast, which leaves no trace in a graph."""

    def refuse(_: Any) -> None:
        raise Untraceable("its forward changes autocast")

    enter = torch.autocast.__enter__
    torch.autocast.__enter__ = refuse  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return text[0] if isinstance(error, Untraceable) else f"{type(error).__name__}: {text[0]}"


@contextlib.contextmanager
def _intact(module: nn.Module) -> Iterator[None]:
    """Undo what a traced forward writes to the attributes of its module; raise `Untraceable` if it wrote any."""
    before = {name: (value, _items(value)) for name, value in module.__dict__.items()}
    try:
        yield
    finally:
        written = [name for name in module.__dict__ if name not in before]
        for name in written:
            del module.__dict__[name]
        for name, (value, items) in before.items():
            now = module.__dict__.get(name)
            if now is value and _same(items, _items(value)):
                continue
            written.append(name)
            module.__dict__[name] = value
            if items is not None and not isinstance(value, tuple):
                value.clear()
                value.update(items) if isinstance(value, (dict, set)) else value.extend(items)
    if written:
        raise Untraceable(f"its forward writes the attribute {written[0]}")


def _items(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else None


def _same(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return bool(a == b)


class Link:
    """A `Chain` and the nodes of a graph it stands for."""

    def __init__(self, chain: Chain, nodes: list[fx.Node], addition: tuple[fx.Node, int] | None) -> None:
        self.chain = chain
        self.nodes = nodes
        self.addition = addition  # the node, and which of its arguments is the residual

    def frames(self) -> tuple[Frame, ...]:
        """The calls that contain all of it."""
        return tuple(frames[0] for frames in zip(*(n.meta["frames"] for n in self.nodes)) if len(set(frames)) == 1)

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
        convs = [node for node, module in self.modules.items() if layers.rank(type(module)) is not None]
        convs = [node for node in convs if self._operand(node) is not None]
        convs.sort(key=lambda node: not layers.is_depthwise(self.modules[node]))  # stable: depthwise first
        links = [self._link(node) for node in convs if node not in self.taken]
        return [link for link in links if link is not None]

    def _link(self, start: fx.Node) -> Link | None:
        conv = self.modules[start]
        walk = _Walk(self, start)
        stages = [walk.stage()]
        if layers.is_depthwise(conv):
            following = walk.peek()
            if following is None:
                self.reasons[conv] = walk.reason
            elif layers.rank(type(conv)) != 3 and layers.is_pointwise(self.modules.get(following)):
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
            or node.target in (operator.setitem, *_IN_PLACE)
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
        if node is not None and self.finder.fold and layers.is_batch_norm(self.finder.modules.get(node)):
            if Stage(conv, self.finder.modules[node]).spelled_activation() is not None and self.finder.step(node):
                norm = self.finder.modules[node]
                self.take(node)
                node = self.peek()
        inner = Stage(conv, norm).spelled_activation()
        if not layers.is_depthwise(conv) and not with_addition:
            return Stage(conv, norm)  # there is nothing to gain from taking its activation
        if with_addition and node is not None and inner == "none" and self._take_addition(node):
            node = self.peek()
        step = None if node is None or inner != "none" else self.finder.step(node)
        if node is not None and step is not None and layers.activation(step) not in (None, "none"):
            act = step
            self.take(node, step)
        return Stage(conv, norm, act)

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
