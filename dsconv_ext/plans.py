"""Plans: what stands in the place of the forward of a module that contains chains."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .chains import Chain, Forward
from .matching import Link
from .nn import _has_hooks


class _Train:
    """`nn.Module.train` of a module whose forward keeps folded weights."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        self.module.forward.forget()
        return type(self.module).train(self.module, mode)


def install(module: nn.Module, forward: Forward) -> None:
    module.forward, module.train = forward, _Train(module)  # type: ignore[method-assign]


class Plan(Forward):
    """The forward of an owner: its own code with chains in the place of modules, where the code would still be that.

    The graph was made for tensors as the only arguments, and for what the attributes of the owner, and of the modules a
    chain reaches into, were at that time. Where anything else is met the code itself runs.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.variants: list[Variant] = []

    def add(self, graph: fx.Graph, links: list[Link], containers: list[nn.Module]) -> None:
        chains = {chain.key: name for name, chain in self.chains().items()}
        used = []
        for link in links:
            name = chains.get(link.chain.key)
            if name is None:
                name = f"chain{len(chains)}"
                chains[link.chain.key] = name
                setattr(self, name, link.chain)
            used.append(name)
            link.substitute(graph, f"forward.{name}")
        self.variants.append(Variant(graph, containers, used))

    def install(self) -> None:
        if self.variants:
            install(self.module, self)
            for variant in self.variants:
                variant.remember()

    def chains(self) -> dict[str, Chain]:
        return {name: value for name, value in self.__dict__.items() if isinstance(value, Chain)}

    def forget(self) -> None:
        for chain in self.chains().values():
            chain.weights.forget()

    def variant(self) -> Variant | None:
        """The graph that is true at this moment."""
        if not _has_any_global_hook():
            for variant in self.variants:
                if variant.is_true():
                    return variant
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        variant = self.variant()
        if variant is None or kwargs or not variant.takes(args):
            return self.own(*args, **kwargs)
        return variant.function(self.module, *args)


def _is_setting(value: Any) -> bool:
    """Whether code may have branched on it, and a later value can be compared with it."""
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, (bool, int, float, str))


class Variant:
    """A graph as a function, and what the modules looked like for which it is true."""

    def __init__(self, graph: fx.Graph, containers: list[nn.Module], chains: list[str]) -> None:
        code = graph.python_code("self")
        self.source, self.globals = code.src, code.globals
        self.arguments = sum(node.op == "placeholder" for node in graph.nodes)
        self.chains = chains
        self.containers = containers
        self.training = containers[0].training
        self.function = self._compile()

    def _compile(self) -> Any:
        namespace = dict(self.globals)
        exec(compile(self.source, "<dsconv_ext.convert>", "exec"), namespace)
        return namespace["forward"]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "function"}
        used = {name: self.globals[name] for name in self.function.__code__.co_names if name in self.globals}
        modules = {name: value.__name__ for name, value in used.items() if isinstance(value, ModuleType)}
        return {**state, "globals": {name: v for name, v in used.items() if name not in modules}, "modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {name: importlib.import_module(module) for name, module in state.pop("modules").items()}
        self.__dict__.update(state)
        self.globals = {**self.globals, **modules}
        self.function = self._compile()

    def remember(self) -> None:
        """Note what the graph depends on, once all forwards are installed."""
        self.children = [dict(m._modules) for m in self.containers]
        self.settings = [
            {**{k: v for k, v in m.__dict__.items() if _is_setting(v)}, "training": self.training}
            for m in self.containers
        ]
        self.forwards = [m.__dict__.get("forward") for m in self.containers]

    def takes(self, args: tuple[Any, ...]) -> bool:
        return len(args) == self.arguments and all(isinstance(arg, Tensor) for arg in args)

    def is_true(self) -> bool:
        for i, module in enumerate(self.containers):
            attributes = module.__dict__
            if attributes["training"] != self.training or attributes["_modules"] != self.children[i]:
                return False
            if i > 0 and (attributes.get("forward") is not self.forwards[i] or _has_hooks(module)):
                return False
            for name, value in self.settings[i].items():
                if attributes.get(name, self) != value:
                    return False
        return True
