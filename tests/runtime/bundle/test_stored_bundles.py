"""Every format version that was ever written is still read, verified and served as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from unipinrec.runtime import Recommender, RecommendOptions, verify_bundle
from unipinrec.runtime.bundle.manifest import FORMAT_VERSION

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
HISTORY = [
    {"item": "item-3", "actions": ["click"], "surface": "home", "timestamp_ms": 1_700_000_000_000},
    {"item": "item-9", "actions": [], "timestamp_ms": 1_700_000_100_000},
]
ANSWERS = {
    "bundle_v1": [
        ("item-19", 0.8628),
        ("item-2", 0.8512),
        ("item-16", 0.8512),
        ("item-12", 0.8493),
        ("item-15", 0.8479),
    ],
    "bundle_v2": [
        ("item-12", 5.6996),
        ("item-14", 5.5870),
        ("item-19", 4.9273),
        ("item-1", 4.1496),
        ("item-21", 2.9935),
    ],
    "bundle_v3": [
        ("item-12", 0.9131),
        ("item-10", 0.9115),
        ("item-14", 0.9102),
        ("item-13", 0.9081),
        ("item-6", 0.9065),
    ],
}


def test_every_version_has_its_bundle() -> None:
    assert {path.name for path in FIXTURES.glob("bundle_v*")} == {f"bundle_v{v + 1}" for v in range(FORMAT_VERSION)}
    assert set(ANSWERS) == {path.name for path in FIXTURES.glob("bundle_v*")}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_stored_bundle_answers_as_it_did(name: str) -> None:
    assert verify_bundle(FIXTURES / name).ok
    options = RecommendOptions(now_ms=1_700_000_200_000, exact=True)
    slate = Recommender.load(FIXTURES / name).recommend(HISTORY, k=5, options=options)
    assert [item.item for item in slate.items] == [item for item, _ in ANSWERS[name]]
    assert [item.score for item in slate.items] == pytest.approx([score for _, score in ANSWERS[name]], abs=1e-4)
