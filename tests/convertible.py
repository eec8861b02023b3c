"""Small modules to convert, and what the tests of convert() ask of the result."""

import contextlib
import operator

import torch
from torch import nn

from dsconv_ext.chains import Chain


@torch.no_grad()
def randomised(model):
    """Norms that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def image(dtype=torch.float64, channels=8, size=9):
    return torch.randn(2, channels, size, size, dtype=dtype)


class Block(nn.Module):
    """Depthwise, BatchNorm, activation, pointwise, BatchNorm, and what a subclass or an argument makes of the rest."""

    def __init__(self, act=nn.ReLU6, channels=8, **conv):
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, groups=channels, **{"padding": 1, "bias": False, **conv})
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = act()
        self.pw = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn2(self.pw(self.act(self.bn1(self.dw(x)))))


class Residual(Block):
    combine = staticmethod(operator.add)

    def forward(self, x):
        return self.combine(super().forward(x), x)


def eval_block(cls=Block, *args, **kwargs):
    return randomised(cls(*args, **kwargs)).double().eval()


@contextlib.contextmanager
def chain_runs():
    """Count the chains that run as one operator."""
    count = []
    compute = Chain._compute

    def counting(self, *args):
        count.append(len(self.stages))
        return compute(self, *args)

    Chain._compute = counting
    try:
        yield count
    finally:
        Chain._compute = compute


def status(model):
    return {row.path: row.status for row in model.dsconv_report}


def reason(model, path="dw"):
    return next(row.reason for row in model.dsconv_report if row.path == path)


def assert_same(converted, original, *inputs, fused=None, rtol=1e-9, gradients=True):
    """Same values without gradients (twice: the second time from kept weights), same values and gradients with them."""
    with torch.no_grad():
        expected = original(*inputs)
        with chain_runs() as runs:
            torch.testing.assert_close(converted(*inputs), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(converted(*inputs), original(*inputs), rtol=1e-10, atol=1e-10)
    if fused is not None:
        assert runs.count(2) == fused
    if not gradients:
        return
    inputs = [x.detach().requires_grad_() for x in inputs]
    ours, theirs = converted(*inputs), original(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert ours.requires_grad == theirs.requires_grad
    if not theirs.requires_grad:
        return
    g = torch.randn_like(theirs)
    names = [name for name, p in original.named_parameters() if p.requires_grad]
    ours_p, theirs_p = dict(converted.named_parameters()), dict(original.named_parameters())
    ours_g = torch.autograd.grad(ours, [*inputs, *(ours_p[n] for n in names)], g, allow_unused=True)
    theirs_g = torch.autograd.grad(theirs, [*inputs, *(theirs_p[n] for n in names)], g, allow_unused=True)
    torch.testing.assert_close(ours_g, theirs_g, rtol=rtol, atol=rtol)
