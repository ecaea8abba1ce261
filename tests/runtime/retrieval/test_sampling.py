"""Searches in service are compared with exact ones, beside the requests and not before them."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from answers import retrieved
from numpy.typing import NDArray

from unipinrec.errors import ConfigError
from unipinrec.runtime.bundle.catalogue import Eligible
from unipinrec.runtime.retrieval.retriever import Retriever
from unipinrec.runtime.retrieval.sampling import RecallSampler
from unipinrec.runtime.retrieval.scan import ExactIndex, Matches
from unipinrec.runtime.server.deployment import Deployment, DeploymentOptions
from unipinrec.runtime.server.swap import Deployments

VECTORS = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
NONE = np.empty(0, np.int64)


class Forgetful:
    """An index that never finds the nearest item."""

    ef = 1

    def search(self, queries: NDArray[np.float32], k: int) -> Matches:
        rows, similarity = ExactIndex(VECTORS).search(queries, k + 1)
        return rows[:, 1:], similarity[:, 1:]


class Broken(ExactIndex):
    """Fails whenever it is asked."""

    def near(self, queries: NDArray[np.float32], k: int, eligible: Sequence[Eligible]) -> list[NDArray[np.int64]]:
        raise MemoryError


@pytest.fixture
def retriever() -> Retriever:
    return Retriever(index=Forgetful(), scan=ExactIndex(VECTORS), item_vectors=VECTORS, visit_cost=0)


@pytest.fixture
def sampler() -> Iterator[RecallSampler]:
    opened = RecallSampler(1.0)
    yield opened
    opened.close()


def test_recall_is_that_of_what_the_request_got(retriever: Retriever, sampler: RecallSampler) -> None:
    measured: list[float] = []
    sampler.observe = measured.append
    watched, query = sampler.watch(retriever), VECTORS[:1]
    plain = retrieved(retriever, query, 10, NONE)
    found = retrieved(watched, query, 10, NONE)
    np.testing.assert_array_equal(found.rows, plain.rows)
    sampler.settle()
    assert measured == [pytest.approx(0.9)]
    excluded = np.array([0])  # the nearest item is the query itself: without it the index finds all
    retrieved(watched, query, 10, excluded)
    sampler.settle()
    assert measured[1:] == [pytest.approx(1.0)]


def test_a_scan_is_not_compared_with_itself(retriever: Retriever, sampler: RecallSampler) -> None:
    measured: list[float] = []
    sampler.observe = measured.append
    retrieved(sampler.watch(retriever), VECTORS[:1], 10, NONE, exact=True)
    sampler.settle()
    assert measured == []


def test_items_that_a_request_names_are_not_compared(
    retriever: Retriever, sampler: RecallSampler, caplog: pytest.LogCaptureFixture
) -> None:
    found = retrieved(sampler.watch(retriever), VECTORS[:1], 0, NONE)
    sampler.settle()
    assert (len(found.rows), found.exact, caplog.text) == (0, None, "")


def test_a_share_is_compared(retriever: Retriever) -> None:
    measured: list[float] = []
    for share, fewest, most in ((0.0, 0, 0), (0.2, 20, 60)):
        sampler = RecallSampler(share, seed=1)
        sampler.observe = measured.append
        watched = sampler.watch(retriever)
        for index in range(200):
            retrieved(watched, VECTORS[index : index + 1], 5, NONE)
            sampler.settle()
        sampler.close()
        assert fewest <= len(measured) <= most
        assert sampler.passed_over == 0


def test_requests_do_not_wait_for_a_comparison(retriever: Retriever, sampler: RecallSampler) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(_recall: float) -> None:
        entered.set()
        assert go_on.wait(20)

    sampler.observe = slow
    watched = sampler.watch(retriever)
    retrieved(watched, VECTORS[:1], 5, NONE)
    assert entered.wait(20)
    for _ in range(3):
        assert len(retrieved(watched, VECTORS[:1], 5, NONE).rows) == 5
    assert sampler.passed_over == 3
    go_on.set()
    sampler.settle()


def test_a_comparison_that_fails_is_not_the_last(
    retriever: Retriever, sampler: RecallSampler, caplog: pytest.LogCaptureFixture
) -> None:
    measured: list[float] = []
    sampler.observe = measured.append
    broken = sampler.watch(dataclasses.replace(retriever, scan=Broken(VECTORS)))
    retrieved(broken, VECTORS[:1], 5, NONE)
    sampler.settle()
    retrieved(sampler.watch(retriever), VECTORS[:1], 5, NONE)
    sampler.settle()
    assert len(measured) == 1
    assert "a sampled search could not be compared" in caplog.text


def test_nothing_of_a_bundle_is_held_afterwards(retriever: Retriever, sampler: RecallSampler) -> None:
    watched = sampler.watch(retriever)
    retrieved(watched, VECTORS[:1], 5, NONE)
    sampler.settle()
    left = weakref.ref(watched)
    gc.disable()
    try:
        del watched
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ConfigError, match="must be from 0 to 1"):
        RecallSampler(share)


def test_closing_ends_the_thread(retriever: Retriever) -> None:
    sampler = RecallSampler(1.0)
    sampler.close()
    sampler.close()
    retrieved(sampler.watch(retriever), VECTORS[:1], 5, NONE)
    assert sampler.passed_over == 1


def test_what_takes_over_is_sampled_too(twins: tuple[Path, Path], sampler: RecallSampler) -> None:
    deployments = Deployments(Deployment.open(twins[0], DeploymentOptions(device="cpu", sampler=sampler)))
    for bundle in (twins[1], twins[0]):
        watched = deployments.swap(bundle).recommender.retriever
        assert getattr(watched, "sampler", None) is sampler
    assert deployments.close(timeout_s=20)
