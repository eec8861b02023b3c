"""The benchmark: shape files, sampling, and short real runs. No time is asserted."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cases import Case

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("rich")
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import measure, peers, plot, problems, providers, report, roofline, runner, worker  # noqa: E402

SHAPE_FILES = sorted(problems.SHAPES.glob("*.txt"))
SMALL = (
    "dw n2c8h9w7k3s1d1p1 nhwc fp32",
    "dw n1c8h9w7k3s2d1p0:1 nchw fp32 act=silu",
    "dw n2c6w20k4s1d1p3:0 nhwc bf16 act=relu",
    "dw n1c4h6w6k3s1d2p2m2 nchw fp64 bias=none",
    "sep n2c8h9w7k3s1d1p1o12 nhwc fp32 mid=relu6 act=relu6",
    "sep n1c16h8w8k5s2d1p2o8 nchw bf16 mid=hardswish act=hardswish res",
    "sep n2c6w20k4s1d1p3:0o5 nhwc fp64 mid=gelu act=gelu_tanh res",
    "sep n1c8h7w7k3s1d1p1m2o6 nhwc fp16 mid=elu act=leaky_relu:0.2 bias=pw",
)


class Local:
    """A worker in this process, for providers that behave."""

    def __init__(self, provider: str, threads: int, limit: float) -> None:
        self.provider, self.threads = provider, threads

    def ask(self, name, line, pass_name, *arguments):
        with torch.set_grad_enabled(pass_name == "step"):
            return worker.REQUESTS[name](self.provider, line, pass_name, *arguments)

    def close(self) -> None:
        pass


def wrong(case, pass_name, given, g):
    """A provider that is off by a hundredth everywhere."""
    work = providers.dsconv(case, pass_name, given, g)
    return lambda: tuple(value if value is None else value + 1e-2 for value in work())


WRONG = providers.Provider(wrong)
ABSENT = providers.Provider(wrong, packages=("torch", "no_such_package"))
ROOF = roofline.Roofline(1, {"fp32": 100.0, "bf16": 200.0}, [(2**16, 80.0), (2**18, 20.0)])
PEERS = {"onnxruntime": "nchw", "openvino": "nhwc"}
ODD_PROVIDERS = """
import os, time
from bench import providers

def hang(case, pass_name, given, g):
    if case.channels == 8:
        time.sleep(1000)
    if case.channels == 4:
        raise RuntimeError("cannot")
    return providers.dsconv(case, pass_name, given, g)

def die(case, pass_name, given, g):
    os._exit(3)

hang, die = providers.Provider(hang), providers.Provider(die)
"""


@pytest.fixture
def odd_providers(tmp_path, monkeypatch):
    """The name of a module of providers that hang, die and raise; and the processes that are started."""
    (tmp_path / "odd_providers.py").write_text(ODD_PROVIDERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    class Recorded(runner.Worker):
        def _start(self):
            super()._start()
            started.append(self.process)

    monkeypatch.setattr(runner, "Worker", Recorded)
    return "odd_providers", started


def run(lines, passes, names, **settings) -> list[runner.Row]:
    layers = problems.select([], lines, [], [], [], [])
    chosen = runner.Settings(layers, passes, [1], names, rounds=2, seconds=1e-4, **settings)
    return [row for rows in runner.run(chosen) for row in rows]


# Problems


def test_the_shape_files_are_those_that_are_promised():
    named = {
        "mobilenet_v1",
        "mobilenet_v2",
        "mobilenet_v4_conv_small",
        "efficientnet_lite0",
        "convnext_atto",
        "xception",
    }
    assert {file.stem for file in SHAPE_FILES} == named | {"conformer1d", "aspp"}


@pytest.mark.parametrize("file", SHAPE_FILES, ids=lambda file: file.stem)
def test_shape_file(file):
    """It names its model, and every line is a problem that is written once and computes something."""
    cases = problems.read_shapes(file.stem)
    assert file.read_text().startswith("# Model")
    assert len(cases) == len(set(cases)) > 3
    for case in cases:
        assert case.batch == 1 and case.outputs > 0
        assert Case.parse(str(case)) == case


def test_mobilenet_v2_is_extracted_as_its_paper_has_it():
    """Seventeen depthwise convolutions, each followed by a projection without activation."""
    lines = (problems.SHAPES / "mobilenet_v2.txt").read_text().splitlines()
    counts = {op: sum(int(line.split()[-1][:-1]) for line in lines if line.startswith(op)) for op in ("dw", "sep")}
    assert counts == {"dw": 17, "sep": 17}
    pairs = [case for case in problems.read_shapes("mobilenet_v2") if case.op == "sep"]
    assert {(case.mid[0], case.activation[0], case.bias) for case in pairs} == {("relu6", "none", "both")}


def test_extraction_writes_the_committed_lines():
    pytest.importorskip("timm")
    from bench import extract_shapes

    found = set(extract_shapes.extract(*extract_shapes.MODELS["mobilenet_v4_conv_small"]))
    lines = (problems.SHAPES / "mobilenet_v4_conv_small.txt").read_text().splitlines()
    assert found == {line.partition("  #")[0] for line in lines if not line.startswith("#")}


def test_selection_multiplies_shapes_and_keeps_problem_strings():
    layers = problems.select(["aspp"], [SMALL[0]], ["separable"], [1, 8], ["fp32", "bf16"], ["nhwc", "nchw"])
    pairs = [case for case in problems.read_shapes("aspp") if case.op == "sep"]
    assert len(layers) == 4 * len(pairs) + 1
    assert {layer.layouts for layer in layers[:-1]} == {("nhwc", "nchw")}
    assert layers[-1] == problems.Layer(replace(Case.parse(SMALL[0]), layout="nchw"), ("nhwc",))


@pytest.mark.parametrize("arguments", [{"shapes": ["lenet"]}, {"problems": ["dw n1c8h9w7k3s1d1p1 sliced fp32"]}])
def test_an_unknown_shape_file_or_layout_is_refused(arguments):
    with pytest.raises(ValueError, match="got (layout )?'(lenet|sliced)', expected"):
        problems.select(
            arguments.get("shapes", []), arguments.get("problems", []), ["depthwise"], [1], ["fp32"], ["nhwc"]
        )


def test_work_and_traffic():
    case = Case.parse("sep n2c3h4w4k3s1d1p1o5 nhwc bf16 bias=none")
    depthwise, pointwise = 2 * 2 * 3 * 16 * 9, 2 * 2 * 3 * 16 * 5
    multiples = {"fwd": (1, 1), "dgrad": (1, 1), "wgrad": (1, 2), "bwd": (2, 2), "step": (3, 3)}
    for name, (a, b) in multiples.items():
        assert problems.flops(case, name) == a * depthwise + b * pointwise
    source, output, weights = 2 * 3 * 16, 2 * 5 * 16, 3 * 9 + 3 * 5
    assert problems.traffic(case, "fwd") == 2 * (source + output + weights)
    assert problems.traffic(case, "bwd") == 2 * (2 * source + output + 2 * weights)


def test_the_truth_is_summed_over_images():
    case = Case.parse("dw n3c4h5w5k3s1d1p1 nchw fp64")
    given, g = problems.tensors(case)
    leaves = [t.requires_grad_() for t in given.values()]
    y = torch.nn.functional.conv2d(*leaves, padding=1, groups=4)
    right = problems.truth(case, True)
    torch.testing.assert_close(right["output"], y.detach())
    for name, gradient in zip(given, torch.autograd.grad(y, leaves, g), strict=True):
        torch.testing.assert_close(right[name], gradient)


# Correctness of the providers, in this process


def answer(name: str, case: Case, pass_name: str) -> dict:
    """What a provider computes in this process; a skip where the processor lacks the precision."""
    try:
        return worker.answer(name, str(case), pass_name)
    except peers.PrecisionRefused as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("line", SMALL)
@pytest.mark.parametrize("name", providers.PROVIDERS)
def test_every_provider_is_right_in_every_pass(name, line):
    case = Case.parse(line)
    provider = providers.find(name)
    if provider.missing():
        pytest.skip(f"not installed: {', '.join(provider.missing())}")
    case = replace(case, layout=provider.layout or case.layout)
    for pass_name in (p for p in problems.PASSES if provider.takes(case, p)):
        with torch.set_grad_enabled(pass_name == "step"):
            answers = answer(name, case, pass_name)
        assert list(answers) == problems.results(case, pass_name)
        where, error = problems.worst_error(case, pass_name, answers)
        assert error <= problems.limit(case, pass_name), f"{case} {pass_name}: {where}"


def peer_error(name: str, case: Case) -> tuple[float, float]:
    """The error of a peer, and the limit."""
    if missing := providers.find(name).missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    case = replace(case, layout=PEERS[name])
    return problems.worst_error(case, "fwd", answer(name, case, "fwd"))[1], problems.limit(case, "fwd")


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("activation", peers.ACTIVATIONS)
def test_peers_have_every_activation(name, activation):
    assert set(peers.ACTIVATIONS) == set(providers.ACTIVATIONS)
    parameter = ":0.3" if activation in ("leaky_relu", "elu") else ""
    words = f"mid={activation}{parameter} act={activation}{parameter} res"
    error, limit = peer_error(name, Case.parse(f"sep n2c8h9w7k3s1d1p1m2o12 nchw fp32 {words}"))
    assert error <= limit


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(
    "line", ["dw n2c6w20k4s2d2p3:0 nchw fp32", "dw n1c4t5h6w7k3x1x3s1d1p1x0x1m2 nchw fp32 bias=none"]
)
def test_peers_take_one_and_three_dimensions(name, line):
    error, limit = peer_error(name, Case.parse(line))
    assert error <= limit


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(
    "right, mutant",
    [("Clip ({z}, zero, six)", "Relu ({z})"), ("({z}", "(first"), ("{y} = Identity ({z})", "{y} = Neg ({z})")],
)
def test_a_wrong_graph_is_caught(name, right, mutant, monkeypatch):
    changed = {key: text.replace(right, mutant) for key, text in peers.ACTIVATIONS.items()}
    monkeypatch.setattr(peers, "ACTIVATIONS", changed)
    worker.prepare.cache_clear()
    error, limit = peer_error(name, Case.parse("sep n2c24h9w7k3s1d1p1o24 nchw fp32 mid=relu6"))
    worker.prepare.cache_clear()
    assert not error <= limit


def test_openvino_in_bfloat16_rounds_to_bfloat16():
    """It computes in what it says: its error is bfloat16's, not float32's."""
    line = "sep n2c24h9w7k3s1d1p1o24 nhwc {} mid=relu6"
    single, _ = peer_error("openvino", Case.parse(line.format("fp32")))
    half, limit = peer_error("openvino", Case.parse(line.format("bf16")))
    assert single < 1e-5 < 1e-3 < half <= limit


def test_another_precision_than_asked_for_is_refused(monkeypatch):
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino.CompiledModel, "get_property", lambda *_: openvino.Type.bf16)
    with pytest.raises(peers.PrecisionRefused, match="computes in .*bf.*16.* here, expected"):
        peers.openvino(case := Case.parse(SMALL[0]), "fwd", *problems.tensors(case))


def test_peers_are_left_out_of_what_they_do_not_compute():
    chosen = {
        (dtype, p): [name for name in PEERS if providers.find(name).takes(Case.parse(f"{SMALL[0][:-4]}{dtype}"), p)]
        for dtype in ("fp32", "bf16", "fp16")
        for p in ("fwd", "bwd")
    }
    assert chosen.pop(("fp32", "fwd")) == ["onnxruntime", "openvino"]
    assert chosen.pop(("bf16", "fwd")) == ["openvino"]
    assert set(map(len, chosen.values())) == {0}


@pytest.mark.parametrize("line", [SMALL[0], SMALL[4]])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_value_is_found(line, value):
    case = Case.parse(line)
    for pass_name in problems.PASSES:
        with torch.set_grad_enabled(pass_name == "step"):
            answers = worker.answer("dsconv", line, pass_name)
        for _, values in answers.values():
            before, values[0] = values[0], value
            assert not problems.worst_error(case, pass_name, answers)[1] <= problems.limit(case, pass_name)
            values[0] = before
        answers.popitem()
        assert problems.worst_error(case, pass_name, answers)[1] == math.inf


def test_points_of_a_large_result_do_not_depend_on_its_layout():
    t = torch.randn(2, 40, 30, 20)
    assert problems.points("x", t) == problems.points("x", problems.arrange(t, "nhwc"))
    assert len(problems.points("x", t)[1]) == problems.POINTS


# Sampling


def test_summary_drops_preempted_samples():
    timing = measure.summary([(1e-6 * n, 0) for n in range(1, 12)] + [(1.0, 1), (2.0, 5)])
    assert (timing.samples, timing.dropped, timing.clean) == (11, 2, True)
    assert (timing.median, timing.p20, timing.p80) == pytest.approx((6, 3, 9))


def test_summary_keeps_the_faster_half_where_too_little_is_undisturbed():
    timing = measure.summary([(1e-6 * n, n % 5) for n in range(10, 0, -1)])
    assert (timing.samples, timing.dropped, timing.clean) == (5, 5, False)
    assert timing.median == pytest.approx(3)
    single = measure.summary([(1e-6, 0)])
    assert (single.median, single.p20, single.p80, single.clean) == (*[pytest.approx(1)] * 3, True)


def test_interleaving_visits_in_random_rounds_and_drops_what_fails():
    visited = []

    def candidate(name, answers):
        def visit():
            visited.append(name)
            return [(1e-6, 0)] if visited.count(name) <= answers else []

        return visit

    samples = measure.interleave({name: candidate(name, n) for name, n in (("a", 9), ("b", 9), ("c", 2))}, rounds=9)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 9, "b": 9}
    assert [set(visited[i : i + 3]) for i in (0, 3, 6)] == [{"a", "b", "c"}] * 3
    assert len({tuple(visited[i : i + 2]) for i in range(9, 21, 2)}) == 2
    assert visited.count("c") == 3


def test_interleaving_goes_on_while_samples_are_preempted():
    calls = iter(range(100))
    samples = measure.interleave({"a": lambda: [(1e-6, int(next(calls) < 3))]}, rounds=4)["a"]
    assert len(samples) == 6 and len(measure.undisturbed(samples)) == 3
    assert len(measure.interleave({"a": lambda: [(1e-6, 1)]}, rounds=4)["a"]) == measure.PATIENCE * 4


def test_a_cold_sample_is_one_call():
    calls = []
    sampler = measure.Sampler(lambda: calls.append(1), seconds=1.0, cold=True)
    before = len(calls)
    assert len(sampler()) == measure.SAMPLES_PER_VISIT
    assert len(calls) - before == 1 + measure.SAMPLES_PER_VISIT
    assert sampler.memory.nbytes >= 2 * measure.last_level_cache()


# The roofline


def test_the_roofline_is_measured_in_plausible_units():
    """No processor that runs this is outside: 0.1 to 100,000 GFLOP/s, 0.1 to 10,000 GB/s."""
    roof = roofline.measure_here(["fp32", "bf16"], largest=2**20, rounds=1)
    assert roof.threads == torch.get_num_threads()
    assert [size for size, _ in roof.bandwidths] == [2**16, 2**17, 2**18, 2**19, 2**20]
    assert all(0.1 < speed < 1e4 for _, speed in roof.bandwidths)
    assert set(roof.peaks) == {"fp32", "bf16"} and all(0.1 < peak < 1e5 for peak in roof.peaks.values())
    assert roof.peaks["bf16"] >= roof.peaks["fp32"]


def test_a_disturbed_call_makes_no_bandwidth():
    """What one element takes is taken off, unless the neighbours of this machine made it as slow as a whole copy."""
    assert roofline._bandwidth(2**16, seconds=9e-6, call=1e-6) == pytest.approx(2**16 / 8e3)
    assert roofline._bandwidth(2**16, seconds=0.5e-6, call=1e-6) == pytest.approx(2**16 / 0.25e3)


def test_the_bandwidth_lies_between_the_measured_ones():
    assert [ROOF.bandwidth(size) for size in (1, 2**16, 2**18, 2**30)] == pytest.approx([80, 80, 20, 20])
    assert ROOF.bandwidth(2**17) == pytest.approx(40)
    assert ROOF.bandwidth(1, cold=True) == 20


def test_the_bound_is_the_slower_of_computing_and_moving():
    assert ROOF.bound(1e6, 1000, "fp32") == pytest.approx(10)  # microseconds: 1 MFLOP at 100 GFLOP/s
    assert ROOF.bound(1e6, 1000, "bf16") == pytest.approx(5)
    assert ROOF.bound(1e6, 2**20, "fp32") == pytest.approx(2**20 / 20e9 * 1e6)


def test_rows_have_their_fraction_of_the_roofline(monkeypatch):
    monkeypatch.setattr(runner, "Worker", Local)
    (row,) = run([SMALL[0]], ["fwd"], ["dsconv"], roofs={1: ROOF})
    assert row["roof"] == pytest.approx(max(row["gflops"] / 100, row["gbytes"] / 80))
    (row,) = run([SMALL[0]], ["fwd"], ["dsconv"], roofs={2: ROOF})
    assert row["roof"] is None


# Runs, with worker processes


def test_a_run_end_to_end(tmp_path, capsys, monkeypatch):
    """Two layers through the command line: every row, saved twice, printed again, and compared with itself."""
    monkeypatch.setattr(roofline, "measured", lambda threads, dtypes: replace(ROOF, threads=threads))
    saved, sheet = tmp_path / "out.json", tmp_path / "out.csv"
    names = ["dsconv", "torch"]
    lines = [word for line in (SMALL[0], SMALL[4]) for word in ("--problem", line)]
    options = ["--providers", ",".join(names), "--rounds", "2", "--sample-ms", "0.1", "--pass", "fwd,bwd"]
    assert command.main(["run", *lines, *options, "--json", str(saved), "--csv", str(sheet)]) == 0
    run_data = json.loads(saved.read_text())
    assert {"machine", "versions", "arguments", "absent", "rooflines", "rows"} <= set(run_data)
    assert roofline.load(run_data["rooflines"][0]) == ROOF
    rows = run_data["rows"]
    expected = [(op, name, p) for op in ("dw", "sep") for p in ("fwd", "bwd") for name in names]
    assert [(row["op"], row["provider"], row["pass"]) for row in rows] == expected
    for row in rows:
        assert row["status"] == "ok" and row["error"] < 1e-4 and row["threads"] == 1
        assert row["p20"] <= row["median"] <= row["p80"]
        assert all(row[key] > 0 for key in ("gflops", "gbytes", "roof", "ratio"))
    assert {row["ratio"] for row in rows if row["provider"] == "torch"} == {1.0}
    with open(sheet, encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    for key in ("provider", "gflops", "gbytes", "roof"):
        assert [row[key] for row in written] == [str(row[key]) for row in rows]
    printed = capsys.readouterr().out
    assert command.main(["report", str(saved)]) == 0
    assert capsys.readouterr().out.strip() == printed.strip()
    assert command.main(["compare", str(saved), str(saved)]) == 0
    assert all(row["ratio"] == row["time"] == 1.0 for row in report.compare(rows, rows))


def test_a_wrong_provider_is_caught(monkeypatch):
    monkeypatch.setattr(runner, "Worker", Local)
    rows = run([SMALL[0], SMALL[4]], ["fwd", "dgrad", "wgrad"], [f"{__name__}:WRONG", "torch"])
    off, right = rows[0::2], rows[1::2]
    assert [row["status"] for row in off] == ["wrong"] * 6
    assert all(row["ratio"] is None and row["median"] > 0 for row in off)
    assert [(row["status"], row["ratio"]) for row in right] == [("ok", 1.0)] * 6


def test_a_worker_that_hangs_is_killed_and_replaced(odd_providers):
    module, started = odd_providers
    rows = run([SMALL[0], SMALL[3], SMALL[5]], ["fwd"], [f"{module}:hang"], limit=4.0)
    assert [row["status"] for row in rows] == ["no answer", "failed", "ok"]
    assert rows[1]["detail"] == "RuntimeError: cannot"
    assert "median" not in rows[0] and rows[2]["median"] > 0
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_worker_that_dies_is_reported(odd_providers):
    (row,) = run([SMALL[0]], ["fwd"], [f"{odd_providers[0]}:die"])
    assert (row["status"], row["detail"]) == ("failed", "died")


def test_the_roofline_of_a_process_of_its_own():
    roof = roofline.measured(1, ["fp32"])
    assert (roof.threads, list(roof.peaks)) == (1, ["fp32"]) and len(roof.bandwidths) > 3


def test_a_provider_whose_package_is_absent_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runner, "Worker", Local)
    monkeypatch.setattr(roofline, "measured", lambda threads, dtypes: ROOF)
    absent = f"{__name__}:ABSENT"
    options = ["--rounds", "1", "--sample-ms", "0.1", "--json", str(tmp_path / "out.json")]
    assert command.main(["run", "--problem", SMALL[0], "--providers", f"{absent},torch", *options]) == 0
    assert f"{absent} is left out: not installed: no_such_package" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["absent"] == {absent: ["no_such_package"]}
    assert [row["provider"] for row in saved["rows"]] == ["torch"]
    with pytest.raises(SystemExit):
        command.main(["run", "--problem", SMALL[0], "--providers", absent])
    assert "no_such_package" in capsys.readouterr().err


def test_a_roofline_that_cannot_be_measured_is_named(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "LIMIT", 0.01)
    assert command.roofs(report.console(), problems.select([], [SMALL[0]], [], [], [], []), [1]) == {}
    assert "no roofline with 1 threads: " in capsys.readouterr().out


def test_the_plot_is_a_png(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "Worker", Local)
    rows = run([SMALL[0], SMALL[2], SMALL[4]], ["fwd", "bwd"], ["dsconv", "torch"], roofs={1: ROOF})
    saved = {"machine": "here", "rows": rows, "rooflines": [vars(ROOF)]}
    for name, data in {"full": saved, "empty": {"machine": "here", "rows": []}}.items():
        plot.save(str(tmp_path / name), data)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plot_without_matplotlib_is_refused_before_the_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "run", lambda settings: pytest.fail("something was measured"))
    with pytest.raises(SystemExit):
        command.main(["run", "--problem", SMALL[0], "--plot", "out.png"])
    assert "--plot needs the package matplotlib" in capsys.readouterr().err


def test_unknown_providers_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--problem", SMALL[0], "--providers", "torch,tensorflow"])
    assert "got 'tensorflow', expected module:attribute or one of dsconv," in capsys.readouterr().err


def test_overhead(capsys):
    assert command.main(["overhead", "--rounds", "1"]) == 0
    assert "nn.DepthwiseConv2d" in capsys.readouterr().out
