"""The network that NVIDIA's own parser makes of our graphs, computed: it is what the graphs say, padding left out."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from answers import STORED
from checks import source_of
from fake_gpu import HostMachine
from host_cuda import HostRuntime
from invariants import Shape, extend, independent, same
from network import NUMPY, Network
from numpy.typing import NDArray
from synthetic import random_source

from unipinrec.errors import BackendError
from unipinrec.export.bundle_writer import export_bundle
from unipinrec.export.golden import random_histories
from unipinrec.export.precision.check import LOW_TYPES, add_precisions, sources_of
from unipinrec.export.precision.typed import emulated_graph, typed_graph
from unipinrec.models.config import TINY
from unipinrec.runtime import Bundle, CacheOptions, Recommender
from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.graphs.backend import Precision
from unipinrec.runtime.trt import network as our_network
from unipinrec.runtime.trt.library import LogLines, TensorRT, tensorrt_logger
from unipinrec.runtime.trt.network import ParsedGraph, complete_attention, lost_inputs, parse_graph
from unipinrec.runtime.trt.profiles import default_buckets, for_graph, parse_bucket

GRAPHS = ("encoder", "extend", "retrieval", "ranker")
# Largest difference from the emulation in ONNX Runtime, as a share of an output's largest value: one or two roundings.
BOUNDS = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3, "fp8": 3e-2}
Feeds = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """A bundle with graphs in every precision."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("typed") / "bundle"))
    add_precisions(folder, ["fp16", "bf16", "fp8"], Bundle.open(folder).sample_histories(20), accept_loss=True)
    return folder


def file_of(folder: Path, graph: str, precision: str) -> Path:
    named = folder / f"{graph}_{precision}.onnx"
    return named if named.exists() else folder / f"{graph}.onnx"


def shapes_of(bundle: Bundle, graph: str) -> Iterator[dict[str, tuple[int, ...]]]:
    """The smallest, usual and largest shapes of each profile that is built by default."""
    model, spec = bundle.manifest.model, bundle.manifest.graphs[graph]
    for profile in for_graph(default_buckets(model), spec, model.kv_prefix_slots):
        for which in range(3):
            yield {name: shapes[which] for name, shapes in profile.items()}


def ragged(shapes: dict[str, tuple[int, ...]], manifest: Manifest) -> Feeds:
    """Inputs of rows of different lengths, with values in the padding too."""
    rng, feeds = np.random.default_rng(0), Feeds()
    past = next((shape[2] for name, shape in shapes.items() if name.startswith("past_key_values")), 0)
    events = next((shape[1] for name, shape in shapes.items() if name == "item_vectors"), 0)
    for name, shape in shapes.items():
        if name in ("lengths", "past_lengths"):
            most = events if name == "lengths" else past - manifest.model.kv_prefix_slots
            feeds[name] = np.linspace(most, 1, shape[0]).astype(np.int64)
        elif name.endswith("timestamps_ms"):
            base = 1_760_000_000_000 if name.startswith("past") else 1_760_100_000_000
            feeds[name] = base + np.cumsum(rng.integers(0, 10**7, shape), axis=-1)
        elif name == "surfaces":
            feeds[name] = rng.integers(0, len(manifest.surfaces), shape)
        else:
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def computed_by(file: Path, feeds: Feeds) -> Feeds:
    """What ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def run(network: Network, feeds: Feeds) -> Feeds:
    typed = {name: feeds[name].astype(NUMPY[declared.dtype]) for name, declared in network.inputs.items()}
    with np.errstate(invalid="ignore"):  # an attention that sees nothing, where an input was lost
        return {name: values.astype(np.float32) for name, values in network.run(typed).items()}


def largest_difference(computed: Feeds, expected: Feeds, feeds: Feeds) -> tuple[float, str]:
    """As a share of the largest value of an output, over values that are not padding, and where it is."""
    differences = {}
    for name, values in expected.items():
        off = np.nan_to_num(np.abs(values - computed[name]), nan=np.inf)
        if name.startswith("present"):
            valid = feeds["lengths"] + off.shape[2] - feeds["item_vectors"].shape[1]
            off = np.where((np.arange(off.shape[2]) < valid[:, None])[:, None, :, None], off, 0.0)
        differences[name] = float(off.max() / np.abs(values).max())
    worst = max(differences, key=lambda name: differences[name])
    return differences[worst], worst


@pytest.fixture(scope="module")
def emulated(typed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision], Path]:
    """The file of a graph that computes in fp32 what a typed one is to compute."""
    folder, bundle = tmp_path_factory.mktemp("emulated"), Bundle.open(typed)

    @functools.cache
    def file(graph: str, precision: Precision) -> Path:
        if precision == "fp32" or graph == "retrieval":
            return typed / f"{graph}.onnx"
        for name, model in sources_of(bundle, precision, bundle.sample_histories(20)).items():
            onnx.save(emulated_graph(model, LOW_TYPES[precision]), folder / f"{name}_{precision}.onnx")
        return folder / f"{graph}_{precision}.onnx"

    return file


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize("graph", GRAPHS)
def test_it_computes_the_graph_on_ragged_batches(
    typed: Path, emulated: Callable[[str, Precision], Path], trt: TensorRT, graph: str, precision: Precision
) -> None:
    bundle, network = Bundle.open(typed), Network.of(trt, file_of(typed, graph, precision))
    for shapes in shapes_of(bundle, graph):
        feeds = ragged(shapes, bundle.manifest)
        expected = computed_by(emulated(graph, precision), feeds)
        off, where = largest_difference(run(network, feeds), expected, feeds)
        assert off <= BOUNDS[precision], (where, shapes)


@pytest.fixture(scope="module")
def other_form(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Candidates attend to themselves, by products of their own; heads share keys; queries are conditioned."""
    size = msgspec.structs.replace(TINY, num_kv_heads=1, outcome_conditioned=True)
    folder = tmp_path_factory.mktemp("other") / "bundle"
    export_bundle(random_source("self", 60, size), folder)
    return Bundle.open(folder)


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_other_form_of_attention_is_computed_too(other_form: Bundle, trt: TensorRT, graph: str) -> None:
    file = other_form.path / f"{graph}.onnx"
    network = Network.of(trt, file)
    for shapes in shapes_of(other_form, graph):
        feeds = ragged(shapes, other_form.manifest)
        off, where = largest_difference(run(network, feeds), computed_by(file, feeds), feeds)
        assert off <= BOUNDS["fp32"], (where, shapes)


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """A bundle of the paper's shape; beside its folder lie graphs in less precision and their emulations, 5 GB."""
    source, folder = source_of("paper"), tmp_path_factory.mktemp("paper")
    export_bundle(source, folder / "bundle", histories=random_histories(source))
    bundle = Bundle.open(folder / "bundle")
    for precision, low in LOW_TYPES.items():
        for graph, model in sources_of(bundle, precision, bundle.sample_histories(20)).items():
            onnx.save(typed_graph(model, low), folder / f"typed_{graph}_{precision}.onnx")
            onnx.save(emulated_graph(model, low), folder / f"emulated_{graph}_{precision}.onnx")
    yield bundle
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("graph", "precision"), [("retrieval", "fp32"), *product(("encoder", "extend", "ranker"), BOUNDS)]
)
def test_it_computes_the_graph_at_the_papers_shape(paper: Bundle, trt: TensorRT, graph: str, precision: str) -> None:
    """12 layers of width 768: one request at the smallest and usual shape, and three of up to 992 events.

    All of it takes 17 minutes on two busy cores, half of them to export. The largest shapes of the default profiles
    were not run. fp32 keeps its bound (found: 1e-6). Less precision has twice its bound, two roundings of the
    largest value: some of tens of millions of values are that far off (fp16 1.4e-3, bf16 8.9e-3, fp8 3.3e-2). So is the
    emulation from itself if its inputs are scaled by a millionth (fp16: 1.1e-3).
    """
    exact, model = paper.path / f"{graph}.onnx", paper.manifest.model
    files = [paper.path.parent / f"{kind}_{graph}_{precision}.onnx" for kind in ("typed", "emulated")]
    (typed, emulated), bound = (files, 2 * BOUNDS[precision]) if precision != "fp32" else ((exact, exact), 1e-5)
    before = 496 if graph == "extend" else 992
    full = parse_bucket(f"batch=3,history=992,past={before},new=496,candidates=656", model)
    profiles = for_graph((full, default_buckets(model)[0]), paper.manifest.graphs[graph], model.kv_prefix_slots)
    network = Network.of(trt, typed)
    for profile, which in ((1, 0), (1, 1), (0, 0)):
        feeds = ragged({name: sizes[which] for name, sizes in profiles[profile].items()}, paper.manifest)
        off, where = largest_difference(run(network, feeds), computed_by(emulated, feeds), feeds)
        print(f"{graph} {precision}: {where} {off:.2g}, {off / bound:.2f} of the bound")
        assert off <= bound, where


Broken = Callable[[Any, Any, onnx.GraphProto], Any]


def broken_network(trt: TensorRT, file: Path, change: Broken) -> tuple[Network, list[str]]:
    """A parsed network that something was done to, and what the lint says of it."""
    logger = tensorrt_logger(trt.module, LogLines())
    definition = trt.module.Builder(logger).create_network(
        1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = trt.module.OnnxParser(definition, logger)
    assert parser.parse_from_file(str(file))
    graph = onnx.load(file).graph
    alive = [change(trt.module, definition, graph)]
    lost = lost_inputs(trt.module, definition, graph)
    return Network(trt.module, ParsedGraph(network=definition, parser=parser, constants=alive), graph), lost


@pytest.mark.parametrize(("graph", "lost"), [("encoder", "lengths"), ("ranker", "add_")])
def test_what_the_parser_alone_makes_is_wrong_and_refused(
    typed: Path, trt: TensorRT, graph: str, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = typed / f"{graph}.onnx"
    network, problems = broken_network(trt, file, lambda *_: None)
    (shapes,) = list(shapes_of(Bundle.open(typed), graph))[-1:]
    feeds = ragged(shapes, Bundle.open(typed).manifest)
    assert largest_difference(run(network, feeds), computed_by(file, feeds), feeds)[0] > 1e-2
    assert any(f"has lost a mask or lengths, the graph gives it {lost}" in problem for problem in problems)
    monkeypatch.setattr(our_network, "complete_attention", lambda *_: [])
    lines = LogLines()
    logger = tensorrt_logger(trt.module, lines)
    with pytest.raises(BackendError, match=rf"would not compute what the graph says: .*the graph gives it {lost}"):
        parse_graph(trt, trt.module.Builder(logger), logger, lines, file)


@pytest.mark.parametrize("graph", ["encoder", "ranker"])
def test_where_attention_takes_no_lengths_a_mask_does_the_same(
    typed: Path, trt: TensorRT, graph: str, without_lengths: None
) -> None:
    network, problems = broken_network(trt, typed / f"{graph}.onnx", complete_attention)
    assert problems == []
    for shapes in shapes_of(Bundle.open(typed), graph):
        feeds = ragged(shapes, Bundle.open(typed).manifest)
        expected = computed_by(typed / f"{graph}.onnx", feeds)
        assert largest_difference(run(network, feeds), expected, feeds)[0] <= BOUNDS["fp32"]


def inputs() -> list[tuple[str, str, str]]:
    """Graph, precision and input, of all that the stored bundle has."""
    manifest = Bundle.open(STORED).manifest
    return [
        (graph, precision, one.name)
        for graph in GRAPHS
        for precision in ("fp32", "bf16")
        for one in manifest.graphs[graph].inputs
        if (precision, one.name) != ("bf16", "surfaces")  # one moves this model's outputs by less than bf16 rounds
    ]


def without(name: str) -> Broken:
    """Put a constant where an input was read."""

    def change(module: Any, network: Any, graph: onnx.GraphProto) -> list[Any]:
        alive = complete_attention(module, network, graph)
        (tensor,) = (one for one in map(network.get_input, range(network.num_inputs)) if one.name == name)
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            for position in range(layer.num_inputs):
                read = layer.get_input(position)
                if read is not None and read.name == name and layer.type.name != "SHAPE":
                    layer.set_input(position, zeros_like(module, network, tensor, alive))
        return alive

    return change


def zeros_like(module: Any, network: Any, tensor: Any, alive: list[Any]) -> Any:
    """A tensor of zeros of an input's shape, which reads nothing but that shape."""
    kind = {"INT64": np.int64, "BOOL": np.bool_}.get(tensor.dtype.name, np.float32)
    alive.append(np.zeros(1, kind))
    flat = network.add_constant((1,) * len(tensor.shape), module.Weights(alive[-1].reshape((1,) * len(tensor.shape))))
    value = flat.get_output(0)
    if value.dtype != tensor.dtype:
        value = network.add_cast(value, tensor.dtype).get_output(0)
    rank = len(tensor.shape)
    alive.append(np.zeros(rank, np.int64))
    start = network.add_constant((rank,), module.Weights(alive[-1])).get_output(0)
    shape = network.add_shape(tensor).get_output(0)
    zeros = network.add_slice(value, (0,) * rank, (1,) * rank, (0,) * rank)
    zeros.set_input(1, start)
    zeros.set_input(2, shape)
    return zeros.get_output(0)


@pytest.mark.parametrize(("graph", "precision", "name"), inputs())
def test_an_input_that_is_lost_is_seen_twice(
    typed: Path, emulated: Callable[[str, Precision], Path], trt: TensorRT, graph: str, precision: Precision, name: str
) -> None:
    network, problems = broken_network(trt, file_of(typed, graph, precision), without(name))
    assert any(f"no layer reads {name}" in problem for problem in problems), problems
    (_, shapes, *_) = shapes_of(Bundle.open(typed), graph)
    shapes = {one: (4, *shape[1:]) for one, shape in shapes.items()}
    feeds = ragged(shapes, Bundle.open(typed).manifest)
    expected = computed_by(emulated(graph, precision), feeds)
    off, _ = largest_difference(run(network, feeds), expected, feeds)
    whole = run(Network.of(trt, file_of(typed, graph, precision)), feeds)
    assert off > 2 * largest_difference(whole, expected, feeds)[0]


def test_an_unknown_layer_fails(typed: Path, trt: TensorRT) -> None:
    def add_top_k(module: Any, network: Any, _: onnx.GraphProto) -> None:
        output = network.get_output(0)
        network.add_topk(output, module.TopKOperation.MAX, 1, 1 << (len(output.shape) - 1))

    network, _ = broken_network(trt, typed / "retrieval.onnx", add_top_k)
    (shapes,) = list(shapes_of(Bundle.open(typed), "retrieval"))[-1:]
    with pytest.raises(NotImplementedError, match="layers of type TOPK are not known"):
        network.run(ragged(shapes, Bundle.open(typed).manifest))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_the_invariants_hold_in_less_precision(typed: Path, precision: str) -> None:
    """Golden requests and sample users, alone and in ragged batches, agree with fp32 when the bundle is loaded."""
    memory = HostRuntime()
    rounding = {"bf16": 0.04, "fp16": 0.005, "fp8": 0.2}[precision]  # of values up to 4
    machine, cache = HostMachine(memory, compiled=True), CacheOptions(budget_bytes=8 << 20, dtype="fp32")
    with Recommender.load(typed, f"tensorrt-{precision}", strict=True, machine=machine, cache=cache) as recommender:
        actions, shape = len(recommender.bundle.manifest.actions), Shape(events=48, candidates=20, cases=3)
        found = {
            **extend(recommender.engine, actions, shape),
            **independent(recommender.engine, actions, shape),
            **same(recommender, recommender.bundle.user_events(recommender.bundle._user_ids()[0])),
        }
    if precision == "fp8":
        del found["extended"]  # it may swap the twentieth item for the next
    assert {name: off for name, off in found.items() if not off <= rounding} == {}
    assert memory.faults == []
