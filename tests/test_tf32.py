"""torch's precision of float32 products on its way to the fused CUDA kernels."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import operators
from dsconv_ext import autograd, functional


@pytest.fixture(autouse=True)
def precision():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


def by_backend(allowed: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"


def by_name(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def by_flag(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


class Calls(TorchDispatchMode):
    """The last argument of every forward of a separable convolution that is not the default."""

    def __init__(self):
        super().__init__()
        self.allowed: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is operators.ops.separable.default:
            self.allowed.append(len(args) > 14 and args[14])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("allow", [by_backend, by_name, by_flag])
@pytest.mark.parametrize(("device", "dtype"), [("cuda", "float32"), ("cuda", "float16"), ("cpu", "float32")])
@pytest.mark.parametrize("differentiated", [False, True])
def test_the_setting_is_that_of_each_call(allow, device, dtype, differentiated):
    """It reaches the operator where it means something: with float32 tensors of a GPU."""
    if differentiated and device == "cuda" and not torch.backends.cuda.is_built():
        pytest.skip("autograd of a torch built without CUDA crashes on fake CUDA tensors")
    options = {"device": device, "dtype": getattr(torch, dtype)}
    with FakeTensorMode(), Calls() as calls:
        x = torch.empty(1, 8, 5, 5, **options, requires_grad=differentiated)
        weights = torch.empty(8, 1, 3, 3, **options), torch.empty(4, 8, 1, 1, **options)
        for allowed in (False, True, False):
            allow(allowed)
            functional.separable_conv2d(x, *weights)
    meaningful = (device, dtype) == ("cuda", "float32")
    assert calls.allowed == [False, meaningful, False]


def test_float32_is_strict_by_default():
    assert not functional._allows_tf32()


def test_compiled_code_is_compiled_anew():
    function = torch.compile(lambda x: x + int(functional._allows_tf32()), fullgraph=True, backend="eager")
    torch._dynamo.reset()
    for allowed in (False, True, False):
        by_backend(allowed)
        assert function(torch.zeros(())).item() == allowed


def arguments(requires_grad: bool = False) -> tuple:
    tensors = operators.separable_tensors(torch.float32, requires_grad)
    return (*tensors, *operators.geometry(), "silu", 0.0, "relu", 0.0, "always")


def test_a_processor_computes_the_same():
    assert torch.equal(operators.ops.separable(*arguments(), True), operators.ops.separable(*arguments()))


def test_every_way_to_differentiate_takes_it():
    x, *rest = arguments(requires_grad=True)
    tensors = [x, *rest[:5]]
    grads = [torch.autograd.grad(autograd.separable(x, *rest, flag).sum(), tensors) for flag in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    x, *rest = arguments()

    def of(flag):
        return lambda one: autograd.separable(one, *rest, flag)

    tangents = [torch.func.jvp(of(flag), (x,), (torch.ones_like(x),))[1] for flag in (False, True)]
    assert torch.equal(*tangents)
    residual, batched = rest[4], torch.stack([x, 2 * x])
    assert residual is None or residual.dim() == x.dim()
    assert torch.equal(*(torch.vmap(of(flag))(batched) for flag in (False, True)))
