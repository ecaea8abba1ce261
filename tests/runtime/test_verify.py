from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answers import STORED
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from unipinrec.errors import BackendError
from unipinrec.runtime import Bundle, verify_bundle
from unipinrec.runtime.bundle.bundle import GOLDEN
from unipinrec.runtime.bundle.integrity import fingerprint
from unipinrec.runtime.bundle.sealed import SealedFiles
from unipinrec.runtime.golden_check import TOLERANCE, compare_golden
from unipinrec.runtime.graphs.engine import Engine
from unipinrec.runtime.machine import driver_problem

Reseal = Callable[..., None]


@pytest.mark.hnswlib
def test_a_whole_bundle(bundle: Path) -> None:
    report = verify_bundle(bundle)
    assert report.ok
    assert {check.file for check in report.files} >= {"manifest.json", "encoder.onnx", "index.hnsw", "weights.bin"}
    assert not any(check.problem for check in report.files)
    assert len(report.golden) == 12
    assert report.device is not None
    assert (report.device.name, report.tolerance) == ("cpu", 1e-4)


@pytest.mark.hnswlib
def test_damaged_files_are_all_reported(copy: Path) -> None:
    (copy / "ranker.onnx").unlink()
    (copy / "index.hnsw").write_bytes(b"")
    report = verify_bundle(copy)
    problems = {check.file: check.problem for check in report.files if check.problem}
    assert problems.keys() == {"ranker.onnx", "index.hnsw"}
    assert problems["ranker.onnx"] == "is missing"
    assert (report.ok, report.golden, report.device) == (False, (), None)


def test_an_altered_manifest_is_reported(copy: Path) -> None:
    (copy / "manifest.sha256").write_text("0" * 64)
    report = verify_bundle(copy)
    assert (report.ok, report.hash, len(report.files)) == (False, None, 1)
    assert "is altered" in (report.files[0].problem or "")


def test_contents_that_contradict_each_other_are_reported(copy: Path, reseal: Reseal) -> None:
    (copy / "item_ids.json").write_text("[]")
    reseal(copy)
    report = verify_bundle(copy)
    assert not report.ok
    assert report.files[-1].file == "contents"
    assert "0 entries for 300 items" in (report.files[-1].problem or "")


def test_outputs_that_differ_are_reported_with_the_difference(copy: Path, reseal: Reseal) -> None:
    golden = load_file(copy / "golden.safetensors")
    golden["extend.present.1.key"][0, 0, 0, 0] += 0.5
    golden["encoder.last_hidden_state"][0, 0] = np.nan
    golden["retrieval.queries"] = golden["retrieval.queries"][:1]
    del golden["ranker.logits"]
    save_file(golden, copy / "golden.safetensors")
    reseal(copy)
    report = verify_bundle(copy)
    problems = {check.output: check.problem for check in report.golden if check.problem}
    assert not report.ok
    assert problems["extend.present.1.key"] == "differs by up to 0.5, at most 0.0001 is allowed"
    assert problems["encoder.last_hidden_state"] == "differs by up to nan, at most 0.0001 is allowed"
    assert problems["retrieval.queries"] == "is (4, 1, 64), expected (1, 1, 64)"
    assert problems["ranker.logits"] == "is missing in golden.safetensors"
    assert len(problems) == 4


def test_padding_is_not_compared(copy: Path, reseal: Reseal) -> None:
    golden = load_file(copy / "golden.safetensors")
    lengths = golden["history.lengths"]
    row = int(lengths.argmin())
    assert lengths[row] < lengths.max()
    golden["encoder.present.0.key"][row, :, lengths[row] + 1 :] = 9.0
    save_file(golden, copy / "golden.safetensors")
    reseal(copy)
    assert verify_bundle(copy).ok


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_difference_is_found_wherever_it_is_but_for_padding(
    stored: Bundle, exact: Engine, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    golden = stored.golden()
    outputs = sorted(name for name in golden if name.startswith(("encoder.", "extend.", "retrieval.", "ranker.")))
    output = data.draw(st.sampled_from(outputs))
    shape, lengths = golden[output].shape, golden["history.lengths"]
    index = data.draw(st.tuples(*(st.integers(0, size - 1) for size in shape)))
    padding = False
    if ".present." in output:
        valid = int((lengths - golden["prefix_lengths"] if output.startswith("extend.") else lengths + 1)[index[0]])
        slot = min(shape[2] - 1, data.draw(st.sampled_from([0, valid - 1, valid, index[2]])))
        index, padding = (*index[:2], slot, index[3]), slot >= valid
    by = data.draw(st.sampled_from([np.nan, np.inf, 2 * TOLERANCE, -1.0]))
    golden[output][index] += np.float32(by)
    file = tmp_path_factory.mktemp("golden") / GOLDEN
    save_file(golden, file)
    altered = replace(stored, files=SealedFiles(file.parent, {GOLDEN: fingerprint(file)}))
    problems = {check.output for check in compare_golden(exact, altered) if check.problem}
    assert problems == (set() if padding else {output})


def test_golden_requests_that_are_missing_are_reported(copy: Path, reseal: Reseal) -> None:
    golden = load_file(copy / "golden.safetensors")
    del golden["prefix_lengths"]
    save_file(golden, copy / "golden.safetensors")
    reseal(copy)
    report = verify_bundle(copy)
    assert not report.ok
    assert "prefix_lengths is missing" in (report.files[-1].problem or "")


@pytest.mark.skipif(driver_problem() is None, reason="this machine has an NVIDIA driver")
def test_a_device_that_is_not_there_is_replaced_and_the_reason_reported(bundle: Path) -> None:
    report = verify_bundle(bundle, "cuda")
    assert report.ok
    assert report.device is not None
    assert report.device.name == "cpu"
    assert report.device.refused[0].startswith("cuda: there is no NVIDIA driver here")
    with pytest.raises(BackendError, match="does not run on cuda and strict allows no other device"):
        verify_bundle(bundle, "cuda", strict=True)


def test_lists_that_are_not_as_good_as_at_export_are_reported(copy: Path, reseal: Reseal) -> None:
    exported = verify_bundle(copy).sample
    assert exported is not None
    assert exported.problem is None
    assert exported.here == exported.exported
    assert exported.here.users > 100
    reseal(copy, sample={"served": exported.here.served + 5})
    report = verify_bundle(copy)
    assert report.sample is not None
    assert (report.ok, report.sample.here) == (False, exported.here)
    assert f"at export {exported.here.served + 5} and" in (report.sample.problem or "")
    reseal(copy, sample={"served": exported.here.served + 1})  # rounding may turn one or two of 200
    assert verify_bundle(copy).ok


def test_a_cache_that_changes_the_ten_best_is_reported(outlying: Path, tmp_path: Path, reseal: Reseal) -> None:
    copy = Path(shutil.copytree(outlying, tmp_path / "copy"))
    report = verify_bundle(copy)
    assert report.ok
    assert report.cache is not None
    assert (report.cache.dtype, report.cache.here, report.cache.problem) == ("bf16", report.cache.exported, None)
    reseal(copy, cache={"dtype": "int8"})
    report = verify_bundle(copy)
    assert report.cache is not None
    assert not report.ok
    assert report.cache.problem == (
        f"with a cache in int8, {report.cache.here.overlap:.4f} of the ten best items are those without a cache; "
        "at least 0.9985 is needed"
    )


def test_a_bundle_without_an_index_is_whole() -> None:
    report = verify_bundle(STORED.with_name("bundle_v3"))
    assert report.ok
    assert report.retrieval == "each request scans 24 items in fp32: the bundle has no index"
