"""The examples of own models: what they serve is what they compute, and HSTU is that of its paper."""

from __future__ import annotations

import ast
import importlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/own-model.md").read_text()
NAMES = ("gru4rec", "sasrec", "hstu")
Floats = NDArray[np.float64]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_serves_what_it_computes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    model = importlib.import_module(name).main(str(bundle))
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"loss \d\.\d after 200 steps; a guess has 5\.3", lines[0])
    assert float(lines[0].split()[1]) < 2.0
    kinds = {"miss": 10, "extended": 30} if name == "sasrec" else {"miss": 40}
    assert lines[1:] == [f"40 of 40 lists are the model's own; scores differ by less than 1e-4: True; {kinds}"]
    assert re.search(
        rf"\$ python examples/{name}\.py bundle\nloss \d\.\d{re.escape(lines[0][8:])}\n{re.escape(lines[1])}\n", PAGE
    )
    if name == "hstu":
        for device in ("cpu", "openvino"):
            require_paper(model, bundle, device)


def require_paper(model: Any, bundle: Path, device: str) -> None:
    """Compare the lists of a served HSTU with the formulae of its paper."""
    from unipinrec.runtime import Event, Recommender

    if device == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    weights = {name: value.detach().numpy().astype(np.float64) for name, value in model.state_dict().items()}
    rng = np.random.default_rng(3)
    with Recommender.load(bundle, device) as recommender:
        for length in (1, 2, 11, 20, 23):
            rows, gaps = rng.integers(0, 200, length), rng.integers(0, 10 ** rng.integers(3, 10, length))
            times = 1_700_000_000_000 + gaps.cumsum()
            history = [
                Event(item=f"item-{row}", actions=("click",), timestamp_ms=int(time))
                for row, time in zip(rows, times, strict=True)
            ]
            slate = recommender.recommend(history, k=100)
            kept = recommender_window(length)
            expected = paper_scores(weights, rows[-kept:], times[-kept:])
            items = [int(item.item.removeprefix("item-")) for item in slate.items]
            np.testing.assert_allclose([item.score for item in slate.items], expected[items], atol=1e-5, rtol=0)
            assert min(expected[items]) > np.delete(expected, [*items, *rows]).max() - 1e-5


def recommender_window(events: int, limit: int = 20, slack: int = 1) -> int:
    """Events that the model reads of a history: docs/kv-cache.md."""
    return events if events <= limit else events - math.ceil((events - limit) / slack) * slack


def silu(x: Floats) -> Floats:
    result: Floats = x / (1 + np.exp(-x))
    return result


def norm(x: Floats) -> Floats:
    """Layer norm without weights."""
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)  # type: ignore[no-any-return]


def paper_scores(weights: dict[str, Floats], rows: NDArray[np.int64], times_ms: NDArray[np.int64]) -> Floats:
    """Equations 1 to 3 of "Actions Speak Louder than Words" (2024), event by event and head by head, for a single user.

        U(X), V(X), Q(X), K(X) = Split(SiLU(f1(X)));  A(X) V(X) = SiLU(Q(X) K(X)^T + rab) V(X) / N
        Y(X) = f2(Norm(A(X) V(X)) * U(X))

    As in the authors' code, X is normalised first, Y is added to it, N is the longest history, and rab is the bias by
    distance plus the bias by the bucket of the time from an event to the one after the event that attends to it.
    """
    items = weights["items.weight"] / np.linalg.norm(weights["items.weight"], axis=1, keepdims=True)
    width, heads, longest, count = items.shape[1], 2, 20, len(rows)
    x = items[rows] * math.sqrt(width)
    seconds = [int(time) // 1000 for time in times_ms]
    following = [*seconds[1:], seconds[-1]]
    for layer in range(2):
        part = {name: weights[f"blocks.{layer}.{name}"] for name in ("uvqk.weight", "uvqk.bias")}
        by_position, by_time = (weights[f"blocks.{layer}.{name}.weight"][:, 0] for name in ("by_position", "by_time"))
        u, v, q, k = np.split(
            np.array([silu(part["uvqk.weight"] @ norm(row) + part["uvqk.bias"]) for row in x]), 4, axis=1
        )
        mixed = np.zeros((count, width))
        for head in range(heads):
            own = slice(head * width // heads, (head + 1) * width // heads)
            for i in range(count):
                for j in range(i + 1):
                    bucket = min(int(math.log(max(1, abs(following[i] - seconds[j]))) / 0.301), len(by_time) - 1)
                    rab = by_position[i - j] + by_time[bucket]
                    mixed[i, own] += silu(q[i, own] @ k[j, own] + rab) * v[j, own] / longest
        out, bias = weights[f"blocks.{layer}.out.weight"], weights[f"blocks.{layer}.out.bias"]
        x = x + np.array([out @ (norm(row) * gate) + bias for row, gate in zip(mixed, u, strict=True)])
    scores: Floats = items @ (x[-1] / np.linalg.norm(x[-1]))
    return scores


def classes(name: str) -> str:
    """The part of an example that defines the model."""
    text = (ROOT / f"examples/{name}.py").read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return "\n".join(text.splitlines()[nodes[0].lineno - 1 : nodes[-1].end_lineno])


@pytest.mark.parametrize(("name", "lines"), [("gru4rec", 30), ("sasrec", 75), ("hstu", 60)])
def test_a_model_is_short(name: str, lines: int) -> None:
    assert len(classes(name).splitlines()) <= lines


def test_the_page_shows_the_example() -> None:
    assert f"```python\n{classes('sasrec')}\n```" in PAGE
