"""What a compilation would do: profiles and memory in literal numbers, and keys."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from answers import STORED

from unipinrec.errors import ConfigError
from unipinrec.runtime import Bundle
from unipinrec.runtime.bundle.manifest import GraphSpec, Manifest, ModelSpec, TensorSpec
from unipinrec.runtime.tools.compile_plan import CompileTask, keys_of, plan_compile
from unipinrec.runtime.trt.library import TensorRT
from unipinrec.runtime.trt.profiles import Buckets, default_buckets, parse_bucket
from unipinrec.runtime.trt.record import BuildOptions

TRT = TensorRT(module=None, flavor="tensorrt", version="11.4.0.106")
PAPER = ModelSpec(
    num_layers=12,
    num_kv_heads=12,
    head_dim=64,
    hidden_size=768,
    item_dim=256,
    max_history=1024,
    kv_prefix_slots=1,
    outcome_conditioned=False,
)


def tensor(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def paper(manifest: Manifest) -> Manifest:
    """The graphs of a model of the paper's shape, as far as keys and values go; in bf16."""
    past = [tensor(name, "bfloat16", "batch", 12, "past", 64) for name in PAPER.kv_names("past_key_values")]
    encoded = [tensor(name, "bfloat16", "batch", 12, "history + 1", 64) for name in PAPER.kv_names("present")]
    added = [tensor(name, "bfloat16", "batch", 12, "new", 64) for name in PAPER.kv_names("present")]
    last, state = (tensor("last_hidden_state", "float32", "batch", 768),) * 2
    events = {length: tensor("item_vectors", "float32", "batch", length, 256) for length in ("history", "new")}
    graphs = {
        "encoder": ((events["history"],), (*encoded, last)),
        "extend": ((events["new"], *past), (*added, last)),
        "retrieval": ((state,), (tensor("queries", "float32", "batch", 1, 256),)),
        "ranker": (
            (
                *past,
                tensor("candidate_vectors", "float32", "batch", "candidates", 256),
                tensor("now", "int64", "batch"),
            ),
            (tensor("logits", "float32", "batch", "candidates", 8),),
        ),
    }
    specs = {name: GraphSpec(file=f"{name}.onnx", inputs=i, outputs=o) for name, (i, o) in graphs.items()}
    return msgspec.structs.replace(manifest, model=PAPER, precision="bf16", graphs=specs)


def test_memory_of_keys_and_values(manifest: Manifest) -> None:
    task = CompileTask(precision="bf16", buckets=(parse_bucket("batch=8,history=992,past=992,candidates=656", PAPER),))
    plans = {plan.graph: plan.profiles[0] for plan in plan_compile(paper(manifest), task)}
    slot = 12 * 2 * 12 * 64 * 2  # layers, key and value, heads, width, bytes
    encoder, extend, ranker = plans["encoder"], plans["extend"], plans["ranker"]
    assert encoder.sizes == {"batch": (8, 8, 8), "history": (992, 992, 992)}
    assert ranker.sizes == {"batch": (8, 8, 8), "past": (993, 993, 993), "candidates": (656, 656, 656)}
    assert (encoder.kv_in_bytes, encoder.kv_out_bytes) == (0, 8 * 993 * slot) == (0, 292_847_616)
    assert (extend.kv_in_bytes, extend.kv_out_bytes) == (8 * 993 * slot, 8 * 1024 * slot)
    assert (ranker.kv_in_bytes, ranker.kv_out_bytes) == (8 * 993 * slot, 0)
    assert ranker.other_bytes == 8 * 656 * (256 + 8) * 4 + 8 * 8
    assert plans["retrieval"].sizes == {"batch": (8, 8, 8)}
    assert plans["retrieval"].other_bytes == 8 * (768 + 256) * 4


def test_a_graph_has_no_profile_twice(manifest: Manifest) -> None:
    plans = plan_compile(paper(manifest), CompileTask(precision="bf16", buckets=default_buckets(PAPER)))
    assert [len(plan.profiles) for plan in plans] == [3, 3, 3, 3]
    same: Buckets = (parse_bucket("batch=8,new=1", PAPER), parse_bucket("batch=8,new=2", PAPER))
    plans = plan_compile(paper(manifest), CompileTask(precision="bf16", buckets=same))
    assert {plan.graph: len(plan.profiles) for plan in plans} == {
        "encoder": 1,
        "extend": 2,
        "retrieval": 1,
        "ranker": 1,
    }


def test_a_dimension_that_is_not_known_is_refused(manifest: Manifest) -> None:
    odd = paper(manifest)
    spec = msgspec.structs.replace(odd.graphs["retrieval"], outputs=(tensor("queries", "float32", "batch", "s10"),))
    odd = msgspec.structs.replace(odd, graphs={**odd.graphs, "retrieval": spec})
    with pytest.raises(
        ConfigError, match=r"a dimension 's10', the known ones are batch, history, new, past, candidates"
    ):
        plan_compile(odd, CompileTask(precision="bf16", buckets=default_buckets(PAPER)))


def test_keys_follow_the_bundle_the_library_and_the_gpu(tmp_path: Path) -> None:
    bundle = Bundle.open(STORED)
    task = CompileTask(precision="fp32", buckets=default_buckets(bundle.manifest.model))
    keys = keys_of(bundle, task, TRT, "sm_90")
    assert list(keys) == ["encoder", "extend", "retrieval", "ranker"]
    key = keys["ranker"]
    assert (key.graph, key.precision, key.flavor, key.version, key.target, key.options) == (
        "ranker",
        "fp32",
        "tensorrt",
        "11.4.0.106",
        "sm_90",
        BuildOptions(),
    )
    assert key.graph_sha256 != keys["encoder"].graph_sha256
    assert len(key.profiles) == 2
    ahead = CompileTask(precision="fp32", buckets=task.buckets, targets=("sm_89", "sm_120"))
    assert keys_of(bundle, ahead, TRT, "")["ranker"].target == "sm_89,sm_120"
    assert keys_of(bundle, task, TRT, "sm_89")["ranker"].digest() != key.digest()
