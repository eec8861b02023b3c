"""What else runs these layers on a CPU: ONNX Runtime and OpenVINO, for the forward pass of one and the same ONNX graph.

Both are optional and imported when first used. The number of threads is the worker's, one stream; the tensors are those
of PyTorch, bound once and not copied. ONNX Runtime computes in float32 from NCHW, the only layout its CPU convolutions
have. OpenVINO computes in float32 or bfloat16, as the problem says, from NCHW or NHWC, whichever is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .problems import Case

# The nodes from ``z`` to ``y``, in the text format of ONNX.
ACTIVATIONS = {
    "none": "{y} = Identity ({z})",
    "relu": "{y} = Relu ({z})",
    "relu6": "{y} = Clip ({z}, zero, six)",
    "hardswish": "{y} = HardSwish ({z})",
    "hardsigmoid": "{y} = HardSigmoid <alpha = 0.16666667, beta = 0.5> ({z})",
    "silu": "{y}_gate = Sigmoid ({z}) {y} = Mul ({z}, {y}_gate)",
    "gelu": '{y} = Gelu <approximate = "none"> ({z})',
    "gelu_tanh": '{y} = Gelu <approximate = "tanh"> ({z})',
    "leaky_relu": "{y} = LeakyRelu <alpha = {parameter:f}> ({z})",
    "sigmoid": "{y} = Sigmoid ({z})",
    "tanh": "{y} = Tanh ({z})",
    "elu": "{y} = Elu <alpha = {parameter:f}> ({z})",
}
IR_VERSION, OPSET = 10, 20


class PrecisionRefused(RuntimeError):
    """The processor has no instructions for the precision that was asked for."""


def graph(case: Case, given: dict[str, Tensor]) -> bytes:
    """The ONNX model of a problem in float32 and NCHW: ``x`` and the residual are inputs, the rest constants."""
    import onnx
    from onnx import numpy_helper, parser

    inputs = {name: t for name, t in given.items() if name in ("x", "residual")}
    constants = {name: t.float() for name, t in given.items() if name not in inputs}
    text = nodes(case, given)
    if "zero" in text:
        constants |= {"zero": torch.tensor(0.0), "six": torch.tensor(6.0)}
    arguments = ", ".join(f"float{list(t.shape)} {name}" for name, t in inputs.items())
    model = parser.parse_model(
        f'<ir_version: {IR_VERSION}, opset_import: ["": {OPSET}]>'
        f"layer ({arguments}) => (float{list(output_shape(case))} output) {{ {text} }}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(t.numpy(), name) for name, t in constants.items())
    onnx.checker.check_model(model)
    return model.SerializeToString()


def nodes(case: Case, given: dict[str, Tensor]) -> str:
    """The convolutions of a problem and what follows each, in the text format of ONNX."""

    def conv(x: str, z: str, prefix: str, settings: str) -> str:
        names = [x, *(name for name in (f"{prefix}weight", f"{prefix}bias") if name in given)]
        return f"{z} = Conv <{settings}> ({', '.join(names)}) "

    def activation(z: str, y: str, named: tuple[str, float]) -> str:
        return ACTIVATIONS[named[0]].format(z=z, y=y, parameter=named[1]) + " "

    pads = [low for low, _ in case.padding] + [high for _, high in case.padding]
    where = {"group": case.channels, "strides": list(case.stride), "dilations": list(case.dilation), "pads": pads}
    settings = ", ".join(f"{name} = {value}" for name, value in where.items())
    if case.op == "dw":
        return conv("x", "sum", "", settings) + activation("sum", "output", case.activation)
    text = conv("x", "first", "depthwise_", settings) + activation("first", "middle", case.mid)
    text += conv("middle", "second", "pointwise_", "group = 1")
    if case.residual:
        text += "sum = Add (second, residual) "
    return text + activation("sum" if case.residual else "second", "output", case.activation)


def output_shape(case: Case) -> tuple[int, ...]:
    return case.batch, case.outputs // case.batch // math.prod(case.output_size), *case.output_size


def onnxruntime(case: Case, pass_name: str, given: dict[str, Tensor], g: Tensor) -> Callable[[], tuple[Tensor]]:
    """ONNX Runtime's CPU kernels, all graph optimizations on."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(graph(case, given), options, providers=["CPUExecutionProvider"])
    y, binding = torch.empty(output_shape(case)), session.io_binding()
    bound = [(binding.bind_input, node.name, given[node.name]) for node in session.get_inputs()]
    for bind, name, t in [*bound, (binding.bind_output, "output", y)]:
        bind(name, "cpu", 0, "float32", list(t.shape), t.data_ptr())

    def work(_alive: Any = bound) -> tuple[Tensor]:  # the binding holds addresses alone
        session.run_with_iobinding(binding)
        return (y,)

    return work


def openvino(case: Case, pass_name: str, given: dict[str, Tensor], g: Tensor) -> Callable[[], tuple[Tensor]]:
    """OpenVINO's CPU plugin, for latency; refused where the plugin would silently compute in another precision."""
    import openvino as ov

    precision = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}[case.dtype_name]
    model = _in_layout(ov.Core().read_model(graph(case, given)), case, precision)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision.get_type_name(),
    }
    compiled = ov.Core().compile_model(model, "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT")
    if used != precision:
        raise PrecisionRefused(f"OpenVINO computes in {used} here, expected {precision}")
    request, y = compiled.create_infer_request(), torch.empty(output_shape(case), dtype=case.dtype)
    if case.layout == "nhwc":
        y = y.movedim(1, -1).contiguous().movedim(-1, 1)

    def shared(t: Tensor) -> Any:
        t = t.movedim(1, -1) if case.layout == "nhwc" else t
        bits = t.view(torch.int16) if t.dtype == torch.bfloat16 else t  # numpy knows no bfloat16
        return ov.Tensor(bits.numpy(), list(t.shape), precision)

    for index, port in enumerate(model.inputs):
        request.set_input_tensor(index, shared(given[port.any_name]))
    request.set_output_tensor(shared(y))

    def work(_alive: Any = given) -> tuple[Tensor]:
        request.infer()
        return (y,)

    return work


def _in_layout(model: Any, case: Case, precision: Any) -> Any:
    """The model with inputs and output in the layout and dtype of the problem."""
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor

    pixels = "DHW"[-case.spatial :]
    steps = PrePostProcessor(model)
    for port in (*(steps.input(index) for index in range(len(model.inputs))), steps.output()):
        port.tensor().set_element_type(precision)
        port.tensor().set_layout(Layout(f"N{pixels}C" if case.layout == "nhwc" else f"NC{pixels}"))
        port.model().set_layout(Layout(f"NC{pixels}"))
    return steps.build()
