"""Graphs of a model's modules by torch.fx, and when they tell the truth."""

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


class Untraceable(Exception):
    """A forward that a graph would not tell the truth about."""


# What a proxy answers differently from a tensor, and what differs from call to call without a trace in a graph.
_QUESTIONS = {"isinstance", "type", "hasattr", "is_grad_enabled", "is_autocast_enabled", "requires_grad", "is_tracing"}


@functools.cache
def _question(cls: Any, method: str = "forward") -> str | None:
    """A question that the code of a method, or of one it calls, asks about its values or the state of torch."""
    code = getattr(inspect.unwrap(getattr(cls, method)), "__code__", None)
    names = () if code is None else code.co_names
    own = (n for n in names if n != method and not hasattr(nn.Module, n) and inspect.isfunction(getattr(cls, n, None)))
    found = [n for n in names if n in _QUESTIONS] + [q for n in own if (q := _question(cls, n)) is not None]
    return found[0] if found else None


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is; torch.fx makes ``x = x + y`` of it."""


IN_PLACE = [getattr(operator, name) for name in operator.__all__ if name[0] == "i" and hasattr(operator, f"__{name}__")]


def _recorder(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in IN_PLACE:
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
            with torch.inference_mode(False), torch.enable_grad(), _autocast_refused(), _intact(module):
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
    cls: Any = type(module)
    if (question := _question(cls)) is not None:
        raise Untraceable(f"its forward asks {question}")


@contextlib.contextmanager
def _autocast_refused() -> Iterator[None]:
    """Raise `Untraceable` where a forward enters autocast, which leaves no trace in a graph."""

    def refuse(_: Any) -> None:
        raise Untraceable("its forward changes autocast")

    enter = torch.autocast.__enter__
    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
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
