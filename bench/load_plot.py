"""The plot of bench/server_load.py as SVG: latency and good answers over the offered rate.

python bench/load_plot.py [--out docs/server-load.svg]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT

WIDTH, HEIGHT, MARGIN = 440, 300, 52
COLOURS = ("#3366cc", "#dc3912", "#109618", "#888888")
Points = list[tuple[float, float]]


def plot(document: dict[str, Any]) -> str:
    """Latency percentiles on a logarithmic axis beside goodput."""
    curve, null = document["curve"], document["null"]
    latencies = {
        name: [(one["patient"]["offered_per_s"], one["patient"]["answered_ms"][name]) for one in curve]
        for name in ("p50", "p95", "p99")
    }
    latencies["p99 of a route that computes nothing"] = [
        (one["offered_per_s"], one["answered_ms"]["p99"]) for one in null
    ]
    rates = [one["offered_per_s"] for one in null]
    goods = {
        f"clients say {document['deadline_ms']:g} ms": [
            (one["hasty"]["offered_per_s"], one["hasty"]["good_per_s"]) for one in curve
        ],
        "clients say nothing": [(one["patient"]["offered_per_s"], one["patient"]["good_per_s"]) for one in curve],
        "offered": [(rate, rate) for rate in rates],
        "in process, at most": [(rate, document["in_process"]["per_s"]) for rate in rates],
    }
    parts = [
        _panel("Answered within, ms", latencies, 0, [0.3, 1, 3, 10, 30, 100, 300, 1000]),
        _panel("Answers a second within 100 ms", goods, WIDTH, None),
    ]
    size = f'width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(title: str, lines: dict[str, Points], left: float, ticks: Sequence[float] | None) -> str:
    """Lines over the offered rate; `ticks` make the upward axis logarithmic."""
    scale: Callable[[float], float] = math.log if ticks else float
    most = max(x for points in lines.values() for x, _ in points)
    top = ticks[-1] if ticks else max(y for points in lines.values() for _, y in points)
    low = scale(ticks[0]) if ticks else 0.0

    def index(x: float, y: float) -> tuple[float, float]:
        up = (min(max(scale(y), low), scale(top)) - low) / (scale(top) - low)
        return left + MARGIN + x / most * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    box = f'x="{left + MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}"'
    parts = [f'<rect {box} fill="none" stroke="#999"/>', _text(left + WIDTH / 2, 24, title, "middle", size=14)]
    parts.append(_text(left + WIDTH / 2, HEIGHT - 12, "requests offered a second", "middle"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_text(index(share * most, top)[0], HEIGHT - MARGIN + 16, f"{share * most:.0f}", "middle"))
    for y in ticks or [share * top for share in (0.0, 0.5, 1.0)]:
        parts.append(_text(left + MARGIN - 6, index(0.0, y)[1] + 4, f"{y:g}" if ticks else f"{y:.0f}", "end"))
    for number, (name, points) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (index(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[number]}" stroke-width="1.5"/>')
        parts.append(_text(left + MARGIN + 8, MARGIN + 16 + 14 * number, name, "start", colour=COLOURS[number]))
    return "\n".join(parts)


def _text(x: float, y: float, words: str, anchor: str, *, size: int = 11, colour: str = "#333") -> str:
    index = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {index} font-size="{size}" fill="{colour}">{words}</text>'


def main() -> None:
    """Draw the last result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "server-load.svg")
    options = parser.parse_args()
    options.out.write_text(plot(json.loads((ROOT / "bench" / "results" / "server_load.json").read_bytes())))


if __name__ == "__main__":
    main()
