from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from unipinrec.errors import BundleError
from unipinrec.runtime import Bundle, Recommender, verify_bundle
from unipinrec.runtime.agreement import measure_agreement
from unipinrec.runtime.bundle.manifest import Agreement, PrecisionSpec
from unipinrec.runtime.graphs.backend import Device
from unipinrec.runtime.graphs.engine import Encoded, Engine, HistoryBatch

Reseal = Callable[..., None]
GOLDEN_REQUESTS, USERS = 4, 48


class Rounded(Engine):
    """ONNX Runtime with answers that are off."""

    rng = np.random.default_rng(0)
    noise, queries_turned_by, last_logit_off_by = 0.0, 0.0, 0.0

    def rank(self, *given: Any) -> NDArray[np.float32]:
        logits = super().rank(*given)
        logits += self.rng.uniform(-self.noise, self.noise, logits.shape)
        logits[..., -1, -1] += self.last_logit_off_by
        return logits

    def retrieve(self, *given: Any) -> NDArray[np.float32]:
        queries = super().retrieve(*given)
        aside = np.roll(queries, 1, axis=-1)
        aside -= (aside * queries).sum(-1, keepdims=True) * queries
        aside /= np.linalg.norm(aside, axis=-1, keepdims=True)
        return np.float32(np.cos(self.queries_turned_by)) * queries + np.float32(np.sin(self.queries_turned_by)) * aside


class Forgetful(Engine):
    """ONNX Runtime that drops new events."""

    def extend(self, past: Encoded, batch: HistoryBatch) -> Encoded:
        return past


class SeesPadding(Engine):
    """ONNX Runtime told that every row is as long as the longest: what TensorRT's parser makes of a graph."""

    def rank(self, encoded: Encoded, *request: Any) -> NDArray[np.float32]:
        return super().rank(replace(encoded, lengths=np.full_like(encoded.lengths, encoded.lengths.max())), *request)


@pytest.fixture
def rounded(bundle: Path) -> Rounded:
    engine = Rounded.on_cpu(Bundle.open(bundle))
    assert isinstance(engine, Rounded)
    return engine


def test_fp32_agrees_with_itself(rounded: Rounded, bundle: Path) -> None:
    found = measure_agreement(rounded, Bundle.open(bundle))
    assert found.problem is None
    assert found.requests == 2 * GOLDEN_REQUESTS + USERS
    assert (found.ranked_overlap, found.retrieved_overlap) == (1.0, 1.0)
    assert (found.ranked_overlap_strict, found.retrieved_overlap_strict) == (1.0, 1.0)
    assert found.max_logit_diff < 1e-4
    assert found.min_query_cosine > 0.99999


def test_swaps_of_close_items_are_ties(rounded: Rounded, bundle: Path) -> None:
    rounded.noise = 0.004
    found = measure_agreement(rounded, Bundle.open(bundle))
    assert found.problem is None
    assert found.ranked_overlap_strict < found.ranked_overlap == 1.0
    assert found.retrieved_overlap_strict == 1.0


def test_noise_within_the_logit_bound_fails_by_overlap(rounded: Rounded, bundle: Path) -> None:
    rounded.noise = 0.08
    found = measure_agreement(rounded, Bundle.open(bundle))
    assert 0.07 < found.max_logit_diff <= 0.0801
    assert found.ranked_overlap < 0.99
    assert found.problem == f"the best 10 items overlap by {found.ranked_overlap:.4f}, at least 0.99 is needed"


def test_one_wrong_logit_fails(rounded: Rounded, bundle: Path) -> None:
    rounded.last_logit_off_by = 0.2
    found = measure_agreement(rounded, Bundle.open(bundle))
    assert found.max_logit_diff == pytest.approx(0.2, abs=0.01)  # less a share of the logit itself
    assert found.problem == f"a logit is off by {found.max_logit_diff:.3g}, at most 0.1 is allowed"


def test_a_loss_that_was_accepted_at_export_is_allowed_to_be_half_as_large_again(
    rounded: Rounded, bundle: Path
) -> None:
    plain = Bundle.open(bundle)
    rounded.device = Device(name="tensorrt-fp8", reason="requested", precision="fp8")
    rounded.last_logit_off_by = 0.4
    lost = msgspec.structs.replace(measure_agreement(rounded, plain), max_logit_diff=0.4)
    assert lost.problem is not None

    def measured(off_by: float, recorded: Agreement) -> str | None:
        """What is allowed, if that is exceeded."""
        spec = PrecisionSpec(graphs={}, agreement=recorded, auc_change={})
        rounded.last_logit_off_by = off_by
        manifest = msgspec.structs.replace(plain.manifest, precisions={"fp8": spec})
        problem = measure_agreement(rounded, replace(plain, manifest=manifest)).problem
        return problem and problem.partition(", ")[2]

    assert measured(0.5, lost) is None
    assert measured(0.7, lost) == "at most 0.6 is allowed"
    harmless = msgspec.structs.replace(lost, problem=None)
    assert measured(0.5, harmless) == "at most 0.1 is allowed"
    rounded.device = Device(name="tensorrt-bf16", reason="requested", precision="bf16")
    assert measured(0.5, lost) == "at most 0.1 is allowed"


@pytest.mark.parametrize(("angle", "cosine"), [(0.05, "0.99875"), (np.nan, "nan")])
def test_queries_that_turn_fail(rounded: Rounded, bundle: Path, angle: float, cosine: str) -> None:
    rounded.queries_turned_by = angle
    found = measure_agreement(rounded, Bundle.open(bundle))
    assert found.problem == f"the cosine of a query with its fp32 query is {cosine}, at least 0.999 is needed"


def test_queries_that_turn_a_little_fail_by_what_they_retrieve(rounded: Rounded, bundle: Path) -> None:
    rounded.queries_turned_by = 0.04
    found = measure_agreement(rounded, Bundle.open(bundle))
    assert found.min_query_cosine > 0.999
    assert found.retrieved_overlap < 0.99
    assert found.problem is not None
    assert "overlap" in found.problem


def test_extension_is_compared_too(bundle: Path) -> None:
    found = measure_agreement(Forgetful.on_cpu(Bundle.open(bundle)), Bundle.open(bundle))
    assert found.problem is not None


def test_padding_that_is_seen_fails_though_every_request_alone_is_right(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    found = measure_agreement(SeesPadding.on_cpu(opened), opened)
    assert (found.ranked_overlap_strict, found.retrieved_overlap_strict) == (1.0, 1.0)
    assert found.problem is not None
    assert found.problem.startswith("a logit is off by ")


def test_bf16_agrees(bundle: Path, bf16_device: str) -> None:
    report = verify_bundle(bundle, bf16_device)
    assert report.ok
    assert report.golden == ()
    assert report.agreement is not None
    assert report.agreement.problem is None
    assert 1e-4 < report.agreement.max_logit_diff < 0.1
    assert report.agreement.ranked_overlap >= 0.99
    assert Recommender.load(bundle, bf16_device).device.name == "openvino-bf16"


def test_what_does_not_agree_is_reported_and_not_served(copy: Path, reseal: Reseal, bf16_device: str) -> None:
    golden = load_file(copy / "golden.safetensors")
    golden["ranker.logits"][1, 2, 0] += 0.5
    save_file(golden, copy / "golden.safetensors")
    reseal(copy)
    report = verify_bundle(copy, bf16_device)
    assert not report.ok
    assert report.agreement is not None
    assert "a logit is off by 0." in (report.agreement.problem or "")
    with pytest.raises(BundleError, match="openvino-bf16 does not recommend what fp32 recommends: a logit is off by"):
        Recommender.load(copy, bf16_device)
    assert Recommender.load(copy, bf16_device, verify=False).bundle.path == copy


def test_golden_outputs_that_are_missing_are_named(copy: Path, reseal: Reseal, rounded: Rounded) -> None:
    golden = load_file(copy / "golden.safetensors")
    del golden["retrieval.queries"]
    save_file(golden, copy / "golden.safetensors")
    reseal(copy)
    with pytest.raises(BundleError, match=r"golden\.safetensors: 'retrieval\.queries' is missing"):
        measure_agreement(rounded, Bundle.open(copy))
