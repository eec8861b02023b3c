"""Convert an existing model: depthwise convolutions, and what follows them, run on the operators of this package."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import layers
from .chains import Chain, ConvForward, Forward
from .checks import check_fuse
from .matching import Finder, Link
from .plans import Plan, install
from .tracing import Frame, Tracer, Untraceable


def convert(
    model: nn.Module, *, inplace: bool = False, fold_batchnorm: bool | None = None, fuse: str = "auto"
) -> nn.Module:
    """Run the depthwise convolutions of a model, and what follows them, on the operators of this package.

    Every depthwise convolution is replaced. Where a 1x1 convolution follows, with nothing but BatchNorm, activation and
    dropout between, one operator computes both, including the BatchNorm, residual and activation after it. The model
    keeps its class, methods, modules, parameters and state_dict: only forwards change, those of the modules that
    contain such a chain and those of the depthwise and 1x1 convolutions. PyTorch computes the other convolutions, with
    the BatchNorm after them folded; without gradients, on a CPU and for channels_last tensors, an operator computes a
    1x1 convolution, together with the BatchNorm, residual and activation that follow it.

    Parameters
    ----------
    model : nn.Module
        Any model. What torch.fx cannot trace is left to its own code, but for the depthwise convolutions inside.
    inplace : bool
        Convert `model` itself instead of a deep copy.
    fold_batchnorm : bool, optional
        Whether BatchNorms become part of the weights while they are in eval mode. None: as their mode says at the time
        of each call. True: the same, and an error if one is in training mode now. False: never; then a BatchNorm
        between two convolutions keeps them apart.
    fuse : {"auto", "always", "never"}
        Whether one pass computes a pair, as in `dsconv_ext.functional.separable_conv2d`.

    Returns
    -------
    nn.Module
        With the attribute ``dsconv_report``, a `Report`. `revert` makes it the original again.

    Raises
    ------
    TypeError, ValueError
        If an argument is something else, or for ``fold_batchnorm=True`` in training mode.

    Notes
    -----
    In training mode BatchNorm needs the whole depthwise map: such a chain runs module by module, and so does one with a
    hook, a parametrization or a module that was exchanged. That is decided in each call. With gradients, folding is
    part of the graph: convolutions and BatchNorms get theirs. Without, the folded weights are kept until a parameter or
    buffer is written to, replaced or moved, an optimizer steps or ``model.train()`` or ``model.eval()`` is called;
    after a write through ``.data`` call ``model.eval()``.

    Examples
    --------
    >>> import torch, dsconv_ext
    >>> from torch import nn
    >>> model = nn.Sequential(
    ...     nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1)
    ... ).eval()
    >>> fast = dsconv_ext.convert(model)
    >>> print(fast.dsconv_report)
    0  depthwise 3x3  fused  with 3; BatchNorm folded
    3  pointwise 1x1  fused  with 0
    >>> x = torch.randn(1, 8, 10, 10)
    >>> torch.allclose(fast(x), model(x), atol=1e-5), fast.state_dict().keys() == model.state_dict().keys()
    (True, True)
    """
    _check(model, inplace=inplace, fold_batchnorm=fold_batchnorm, fuse=fuse)
    model = revert(model if inplace else copy.deepcopy(model))
    paths = {module: path for path, module in model.named_modules()}
    analysis = _Analysis(paths, fold_batchnorm is not False, fuse)
    analysis.search(model)
    plans = [analysis.plan(owner, inlined) for owner, inlined in analysis.owners.items()]
    for plan in plans:
        plan.install()
    for module in paths:
        is_ours = layers.rank(module) is not None and (layers.is_depthwise(module) or layers.is_pointwise(module))
        if is_ours and "forward" not in module.__dict__:
            install(module, ConvForward(module))
    model.dsconv_report = Report(model, analysis.reasons)  # type: ignore[assignment]
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give the modules of a converted model, in place, their own forwards back.

    Parameters
    ----------
    model : nn.Module
        A converted model, a part of one, or any other model, which stays as it is.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> import torch, dsconv_ext
    >>> model = torch.nn.Conv2d(8, 8, 3, groups=8)
    >>> x = torch.randn(1, 8, 10, 10)
    >>> torch.equal(dsconv_ext.revert(dsconv_ext.convert(model))(x), model(x))
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model: got {type(model).__name__}, expected an nn.Module")
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Forward):
            del module.forward, module.train
        if isinstance(module.__dict__.get("dsconv_report"), Report):
            del module.dsconv_report
    return model


def _check(model: Any, *, inplace: Any, fold_batchnorm: Any, fuse: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model: got {type(model).__name__}, expected an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"convert: model: got a scripted {model.original_name}, expected a model in Python")
    if not isinstance(inplace, bool):
        raise TypeError(f"convert: inplace: got {inplace!r}, expected True or False")
    if fold_batchnorm is not None and not isinstance(fold_batchnorm, bool):
        raise TypeError(f"convert: fold_batchnorm: got {fold_batchnorm!r}, expected True, False or None")
    check_fuse("convert: fuse", fuse)
    if fold_batchnorm:
        for path, module in model.named_modules():
            if layers.is_batch_norm(module) and layers.uses_batch_statistics(module):
                raise ValueError(
                    f"convert: fold_batchnorm: got True while the BatchNorm {path!r} uses the statistics of the batch, "
                    "expected a model in eval mode"
                )


class _Analysis:
    """Finds out which modules contain chains: their owners, the innermost modules with all of a chain inside."""

    def __init__(self, paths: dict[nn.Module, str], fold: bool, fuse: str) -> None:
        self.paths, self.fold, self.fuse = paths, fold, fuse
        self.owners: dict[nn.Module, set[nn.Module]] = {}  # and the modules inside them that a chain reaches into
        self.reasons: dict[str, str] = {}  # path of a depthwise convolution -> why it is in no pair

    def search(self, module: nn.Module) -> None:
        """Search the calls inside `module`, and inside whatever torch.fx cannot look into separately."""
        tracer = Tracer()
        try:
            graph = tracer.trace_module(module)
        except Untraceable:
            opaque = [module]
        else:
            finder = Finder(graph, module, self.paths, self.fold, self.fuse)
            for link in finder.find():
                self._add(link)
            self._explain(finder)
            opaque = [m for m in tracer.failures if m in finder.modules.values()]
        for failed in opaque:
            for child in failed.children():
                if any(True for _ in child.children()):
                    self.search(child)
                elif layers.is_depthwise(child):
                    why = tracer.failures.get(failed, "")
                    self.reasons[self.paths[child]] = f"{type(failed).__name__} cannot be traced: {why}"

    def _add(self, link: Link) -> None:
        common = link.frames()
        inlined = self.owners.setdefault(common[-1].module, set())
        for node in link.nodes:
            frames: tuple[Frame, ...] = node.meta["frames"]
            inlined.update(frame.module for frame in frames[len(common) :])

    def _explain(self, finder: Finder) -> None:
        for conv, reason in finder.reasons.items():
            self.reasons.setdefault(self.paths[conv], reason)  # the widest view comes first

    def _closure(self, inlined: set[nn.Module]) -> set[nn.Module]:
        """Add what the chains inside of inlined owners reach into: their own forwards will not be called."""
        while not inlined >= (more := set().union(*(self.owners.get(m, set()) for m in inlined))):
            inlined = inlined | more
        return inlined

    def plan(self, owner: nn.Module, inlined: set[nn.Module]) -> Plan:
        """Trace `owner` in both modes and put its chains together."""
        plan = Plan(owner)
        inlined = self._closure(inlined)
        containers = [owner, *(m for m in self.paths if m in inlined)]
        for training in (owner.training, not owner.training):
            with _mode(containers, training):
                try:
                    graph = Tracer(inlined).trace_module(owner)
                except Untraceable:
                    continue
                finder = Finder(graph, owner, self.paths, self.fold, self.fuse)
                links = finder.find()
                self._explain(finder)
                if links:
                    plan.add(graph, links, containers)
        return plan


@contextlib.contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Set the training flag of these modules, but not of those inside them."""
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


@dataclass(frozen=True)
class Row:
    """A convolution of a converted model.

    Attributes
    ----------
    path : str
        Its name in the model.
    kind : str
        Such as "depthwise 3x3 stride 2".
    status : str
        "fused": one operator computes it together with its partner; "replaced": an operator computes it; "left".
    reason : str
        What else is part of the operator, or why it is not fused or not replaced.
    """

    path: str
    kind: str
    status: str
    reason: str


class Report(Sequence[Row]):
    """What became of each convolution of a converted model, as it is now: modes and hooks count when it is read.

    Examples
    --------
    >>> import dsconv_ext
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1))
    >>> report = dsconv_ext.convert(model).dsconv_report
    >>> report.counts()
    {'fused': 0, 'replaced': 2, 'left': 0}
    >>> report[0].reason
    '0: its BatchNorm uses the statistics of the batch (training mode)'
    """

    def __init__(self, model: nn.Module, reasons: dict[str, str]) -> None:
        self.model, self.reasons = model, reasons

    def __len__(self) -> int:
        return len(self.rows())

    def __getitem__(self, index: Any) -> Any:
        return self.rows()[index]

    def __str__(self) -> str:
        table = [(row.path or "(model)", row.kind, row.status, row.reason) for row in self.rows()]
        widths = [max((len(line[i]) for line in table), default=0) for i in range(4)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)
        return "\n".join(lines)

    def counts(self) -> dict[str, int]:
        """How many convolutions have each status."""
        found = [row.status for row in self.rows()]
        return {status: found.count(status) for status in ("fused", "replaced", "left")}

    def rows(self) -> list[Row]:
        chains: dict[nn.Module, Chain] = {}
        stale: dict[nn.Module, str] = {}
        for path, module in self.model.named_modules():
            plan = module.__dict__.get("forward")
            if isinstance(plan, Plan):
                variant = plan.variant()
                for name, chain in plan.chains().items():
                    for stage in chain.stages:
                        if variant is not None and name in variant.chains:
                            chains[stage.conv] = chain
                        else:
                            stale[stage.conv] = f"{path or 'the model'} has other attributes, hooks or children now"
        return [
            Row(path, layers.describe(module), *self._fate(path, module, chains.get(module), stale.get(module)))
            for path, module in self.model.named_modules()
            if isinstance(module, _ConvNd)
        ]

    def _fate(self, path: str, conv: Any, chain: Chain | None, stale: str | None) -> tuple[str, str]:
        obstacle = None if chain is None else chain.obstacle()
        is_ours = isinstance(conv.__dict__.get("forward"), ConvForward)
        if chain is not None and obstacle is None:
            folded = ["BatchNorm folded"] if any(s.conv is conv and s.norm is not None for s in chain.stages) else []
            if len(chain.stages) == 2:
                partner = chain.paths[chain.stages[0].conv is conv]
                residual = ["residual added"] if None in chain.steps and chain.stages[1].conv is conv else []
                return "fused", "; ".join([f"with {partner}", *folded, *residual])
            reasons = [self._why_alone(path, conv), *folded]
        elif is_ours:
            reasons = [obstacle or stale or self._why_alone(path, conv)]
        else:
            reasons = [self._why_alone(path, conv), obstacle or stale or ""]
        if is_ours and layers.is_pointwise(conv):
            reasons.insert(1, "alone, on a CPU without gradients")
        return "replaced" if is_ours else "left", "; ".join(filter(None, reasons))

    def _why_alone(self, path: str, conv: Any) -> str:
        if layers.is_pointwise(conv):
            return "no depthwise convolution directly before it"
        if not layers.is_depthwise(conv):
            return "not depthwise"
        if layers.rank(conv) is None:
            return f"{type(conv).__name__} has a forward of its own"
        return self.reasons.get(path, "tracing met no call of it")
