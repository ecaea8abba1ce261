"""Every graph is parsed, profiled and built for real, by TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
import pytest
from answers import graph_paths
from onnx import TensorProto, helper

from unipinrec.errors import BackendError
from unipinrec.export.precision.masks import with_masks
from unipinrec.export.precision.typed import LowType, typed_graph
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.trt import network as parsed_network
from unipinrec.runtime.trt.build import BuildTask, build_engine, check_task, known_targets
from unipinrec.runtime.trt.layers import require_precision
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.profiles import ProfileShapes, default_buckets, for_graph
from unipinrec.runtime.trt.record import BuildOptions

GRAPHS = ("encoder", "extend", "retrieval", "ranker")
WITH_ATTENTION = ("encoder", "extend", "ranker")
ADA = ("sm_89",)
NUMPY_NAMES: dict[LowType, str] = {"bf16": "bfloat16", "fp16": "float16"}


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return Bundle.open(bundle)


def profiles_of(bundle: Bundle, graph: str) -> tuple[ProfileShapes, ...]:
    model = bundle.manifest.model
    return for_graph(default_buckets(model), bundle.manifest.graphs[graph], model.kv_prefix_slots)


def task_of(bundle: Bundle, graph: str, **changes: Any) -> BuildTask:
    return BuildTask(**({"profiles": profiles_of(bundle, graph), "targets": ADA} | changes))


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_builds_in_fp32(graph: str, trt: TensorRT, opened: Bundle) -> None:
    built = build_engine(trt, graph_paths(opened)[graph], task_of(opened, graph))
    spec, profiles = opened.manifest.graphs[graph], profiles_of(opened, graph)
    assert len(built.plan) > 100_000
    assert built.layers.tensors == {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    require_precision(built.layers, "fp32")
    types = {name for layer in built.layers.layers for name in (*layer.inputs, *layer.outputs)}
    assert types <= {"float32", "int64", "int32", "bool"}
    assert len(built.activation_bytes) == len(profiles) == 2
    assert set(built.layers.attention.values()) == (set() if graph == "retrieval" else {"decomposed"})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("graph", WITH_ATTENTION)
def test_attention_is_fused_in_less_precision(
    graph: str, precision: LowType, trt: TensorRT, opened: Bundle, tmp_path: Path
) -> None:
    # The weights may be linked into another bundle by now, which ONNX refuses to read.
    copies = [shutil.copy(opened.path / name, tmp_path) for name in (f"{graph}.onnx", "weights.bin")]
    typed, path = typed_graph(onnx.load(copies[0]), precision), tmp_path / f"typed_{graph}.onnx"
    onnx.save(typed, path)
    built = build_engine(trt, path, task_of(opened, graph, profiles=profiles_of(opened, graph)[1:]))
    report, low = built.layers, NUMPY_NAMES[precision]
    require_precision(report, precision)
    attention = [node.name for node in typed.graph.node if node.op_type == "Attention"]
    assert report.attention == dict.fromkeys(attention, "fused")
    assert len(attention) == opened.manifest.model.num_layers
    products = [layer for layer in report.layers if layer.kind == "gemm" or layer.fused_attention]
    assert len(products) >= 8
    assert {name for layer in products for name in layer.inputs if "float" in name} <= {low, "float32"}
    spec = opened.manifest.graphs[graph]
    expected = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    kept = {name: low for name in expected if name.startswith(("present.", "past_key_values."))}
    assert kept
    assert report.tensors == expected | kept


@pytest.mark.parametrize("graph", ["encoder", "ranker"])
def test_what_leaves_padding_out_costs_neither_fusion_nor_memory(
    graph: str, trt: TensorRT, opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network as the parser makes it, completed by lengths, and of a graph with a mask."""
    copies = [shutil.copy(opened.path / name, tmp_path) for name in (f"{graph}.onnx", "weights.bin")]
    model, profiles = onnx.load(copies[0]), profiles_of(opened, graph)[1:]
    shapes = {name: largest for name, (_, _, largest) in profiles[0].items()}
    built = {}
    for how, source in (("lengths", model), ("mask", with_masks(model)), ("parsed", model)):
        if how == "parsed":
            monkeypatch.setattr(parsed_network, "complete_attention", lambda *_: [])
            monkeypatch.setattr(parsed_network, "lost_inputs", lambda *_: [])
        path = tmp_path / f"{how}_{graph}.onnx"
        onnx.save(typed_graph(source, "bf16"), path)
        built[how] = build_engine(trt, path, task_of(opened, graph, profiles=profiles))
    assert {state for one in built.values() for state in one.layers.attention.values()} == {"fused"}
    (scratch,) = built["parsed"].activation_bytes
    if graph == "encoder":
        mask = shapes["item_vectors"][0] * (shapes["item_vectors"][1] + 1)
    else:
        mask = shapes["past_lengths"][0] * shapes["candidate_vectors"][1] * shapes["past_key_values.0.key"][2]
    assert built["lengths"].activation_bytes[0] <= 1.02 * scratch + 4096
    assert built["mask"].activation_bytes[0] <= 1.02 * scratch + 4096 + 4 * mask


def quantised(path: Path) -> Path:
    """A product in fp8: activations and weights are dequantised to bf16 before it."""
    low, eight = TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN
    scale = np.array(0.1, ml_dtypes.bfloat16).tobytes()
    constants = [
        helper.make_tensor("weights", eight, [64, 128], bytes(range(64)) * 128, raw=True),
        helper.make_tensor("scale", low, [], scale, raw=True),
        helper.make_tensor("zero", eight, [], b"\0", raw=True),
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=low),
        helper.make_node("QuantizeLinear", ["low", "scale", "zero"], ["quantised"]),
        helper.make_node("DequantizeLinear", ["quantised", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["weights", "scale", "zero"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["product"], name="product"),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 128])]
    graph = helper.make_graph(nodes, "quantised", given, made, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def test_a_quantised_product_reads_fp8(trt: TensorRT, tmp_path: Path) -> None:
    task = BuildTask(profiles=({"x": ((1, 64), (4, 64), (8, 64))},), targets=ADA)
    report = build_engine(trt, quantised(tmp_path / "quantised.onnx"), task).layers
    require_precision(report, "fp8")
    (product,) = (layer for layer in report.layers if layer.kind == "gemm")
    assert (product.inputs, product.outputs) == (("float8_e4m3fn",), ("bfloat16",))
    assert "product" in product.nodes


def test_the_progress_goes_from_nothing_to_all(trt: TensorRT, opened: Bundle) -> None:
    told: list[tuple[float, str]] = []
    build_engine(
        trt,
        graph_paths(opened)["retrieval"],
        task_of(opened, "retrieval", progress=lambda share, phase: told.append((share, phase))),
    )
    shares = [share for share, _ in told]
    assert len(told) > 20
    assert shares == sorted(shares)
    assert 0.0 <= shares[0] < 0.1
    assert told[-1] == (1.0, "done")
    assert "Building engine" in {phase for _, phase in told}


def test_control_c_ends_a_build(trt: TensorRT, opened: Bundle) -> None:
    steps: list[str] = []

    def interrupt(share: float, phase: str) -> None:
        steps.append(phase)
        if len(steps) == 3:
            assert threading.current_thread() is not threading.main_thread()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)  # steps come in bursts; let the main thread see the signal before the next

    # What runs in a shell's background inherits that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(trt, graph_paths(opened)["ranker"], task_of(opened, "ranker", progress=interrupt))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(steps) < 100
    build_engine(trt, graph_paths(opened)["retrieval"], task_of(opened, "retrieval"))


@pytest.mark.parametrize("targets", [("sm_80",), ("sm_89", "sm_120"), ("portable",)])
def test_engines_are_built_for_other_gpus(targets: tuple[str, ...], trt: TensorRT, opened: Bundle) -> None:
    built = build_engine(trt, graph_paths(opened)["retrieval"], task_of(opened, "retrieval", targets=targets))
    require_precision(built.layers, "fp32")


def test_targets_are_those_of_the_library(trt: TensorRT) -> None:
    assert known_targets(trt) == ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
    assert known_targets(TensorRT(module=trt.module, flavor="tensorrt", version="11.4")) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ("sm_90",)},
            r"has no target sm_90; it has sm_75, sm_80, sm_86, sm_89, sm_120, sm_121, or portable",
        ),
        ({"targets": ("sm_89", "90")}, r"has no target 90; it has"),
        ({"targets": ("sm_89", "portable")}, r"has no target portable; it has .* or portable alone"),
        (
            {"options": BuildOptions(strip_weights=True)},
            r"strips weights and makes version-compatible engines only on a",
        ),
        ({"options": BuildOptions(version_compatible=True)}, r"only on a machine with a GPU; leave the option out"),
        ({"timing_cache": Path("timings")}, r"has no timing cache, it compiles kernels in its first run"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(
    changes: dict[str, Any], message: str, trt: TensorRT, tmp_path: Path
) -> None:
    task = BuildTask(**({"profiles": (), "targets": ADA} | changes))
    with pytest.raises(BackendError, match=message):
        build_engine(trt, tmp_path / "absent.onnx", task)


def test_tensorrt_proper_builds_on_the_gpu_that_it_builds_for() -> None:
    proper = TensorRT(module=None, flavor="tensorrt", version="11.4.0.106")
    with pytest.raises(
        BackendError, match=r"^TensorRT 11.4.0.106 builds on the GPU that it builds for; .*tensorrt_rtx"
    ):
        check_task(proper, BuildTask(profiles=(), targets=ADA))
    check_task(proper, BuildTask(profiles=(), timing_cache=Path("timings"), options=BuildOptions(strip_weights=True)))


def test_what_tensorrt_says_is_in_the_message(trt: TensorRT, opened: Bundle, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"broken.onnx: TensorRT-RTX .* does not read it: .*Failed to parse"):
        build_engine(trt, broken, task_of(opened, "retrieval"))
    file = graph_paths(opened)["retrieval"]
    with pytest.raises(BackendError, match=r"does not build it: .*Turing \(SM75\): FP32 GEMM is not supported"):
        build_engine(trt, file, task_of(opened, "retrieval", targets=("sm_75",)))
    scarce = BuildOptions(workspace_bytes=1)
    with pytest.raises(BackendError, match=r"does not build it: .*workspace"):
        build_engine(trt, graph_paths(opened)["ranker"], task_of(opened, "ranker", options=scarce))


def test_a_profile_that_does_not_fit_the_graph_is_refused(trt: TensorRT, opened: Bundle) -> None:
    (shapes, *_) = profiles_of(opened, "retrieval")
    small, usual, _ = shapes["last_hidden_state"]
    wrong = {**shapes, "last_hidden_state": (small, usual, (8, 63))}
    with pytest.raises(BackendError, match=r"retrieval.onnx: TensorRT-RTX"):
        build_engine(trt, graph_paths(opened)["retrieval"], task_of(opened, "retrieval", profiles=(wrong,)))


def test_without_a_driver_nothing_is_built_for_this_gpu(trt: TensorRT, opened: Bundle) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=r"does not build it: .*CUDA driver version is insufficient"):
        build_engine(trt, graph_paths(opened)["retrieval"], task_of(opened, "retrieval", targets=None))


def test_an_optimization_level_is_taken(trt: TensorRT, opened: Bundle) -> None:
    quick = msgspec.structs.replace(BuildOptions(), optimization_level=0, workspace_bytes=2**28)
    built = build_engine(trt, graph_paths(opened)["retrieval"], task_of(opened, "retrieval", options=quick))
    assert built.seconds > 0
