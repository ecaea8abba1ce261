"""The plot of docs/quality.md, drawn from bench/results/quality: training curves and the sweep over p_mask.

python bench/plot_quality.py [--out docs/quality.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from quality_runs import RESULTS, figures, finished

WIDTH, HEIGHT, MARGIN = 440, 280, 48
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099")
SWEEP = {"mask_0": 0.0, "mask_0.1": 0.1, "joint": 0.2, "mask_0.3": 0.3}
ACTION = "long_view"
Line = tuple[str, list[tuple[float, float]]]


def panel(title: str, across: str, lines: list[Line], left: float) -> str:
    """One plot of lines [(x, y), ...] with its axes, as SVG."""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    spread = (max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0)

    def index(x: float, y: float) -> tuple[float, float]:
        return (
            left + MARGIN + (x - min(xs)) / spread[0] * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - (y - min(ys)) / spread[1] * (HEIGHT - 2 * MARGIN),
        )

    parts = [_text(left + WIDTH / 2, 22, title, size=14), _text(left + WIDTH / 2, HEIGHT - 10, across)]
    for share in (0.0, 0.5, 1.0):
        x, y = min(xs) + share * spread[0], min(ys) + share * spread[1]
        parts.append(_text(index(x, min(ys))[0], HEIGHT - MARGIN + 16, f"{x:.3g}"))
        parts.append(_text(left + MARGIN - 22, index(min(xs), y)[1] + 4, f"{y:.4f}"))
    box = f'x="{left + MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}"'
    parts.append(f'<rect {box} fill="none" stroke="#999"/>')
    for number, (name, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (index(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(_text(left + WIDTH - MARGIN - 60, HEIGHT - MARGIN - 10 - 14 * number, name, colour=colour))
    return "\n".join(parts)


def curves(stem: str) -> list[Line]:
    """NDCG@10 on validation by epoch, a line per seed."""
    return [
        (f"seed {run['seed']}", [(p["epoch"], p["NDCG@10"]) for p in run["curve"] if p["NDCG@10"] is not None])
        for run in finished(stem)
    ]


def sweep(figure: str) -> list[Line]:
    """Mean of a figure over the seeds that every p_mask has."""
    runs = {p: {run["seed"]: run for run in finished(f"kuairand_last_fit_{row}")} for row, p in SWEEP.items()}
    seeds = set.intersection(*(set(found) for found in runs.values()))
    if not seeds:
        return []
    means = [(p, fmean(figures(runs[p][seed]["metrics"], (ACTION,))[figure] or 0.0 for seed in seeds)) for p in runs]
    return [(f"{len(seeds)} seed{'s' * (len(seeds) > 1)}", means)]


def main() -> None:
    """Draw every panel whose results are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/quality.svg"))
    options = parser.parse_args()
    wanted = [("ML-1M, NDCG@10 on validation", "epoch", curves("ml1m"))]
    for figure in (f"{ACTION} auc", "NDCG@10"):
        wanted.append((f"KuaiRand-Pure, {figure}", "p_mask", sweep(figure)))
    panels = [panel(*plot, left=WIDTH * i) for i, plot in enumerate(p for p in wanted if any(line[1] for line in p[2]))]
    if not panels:
        raise SystemExit(f"no finished runs in {RESULTS}; run quality_ml1m.py or quality_kuairand.py first")
    size = f'viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}" font-family="sans-serif"'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *panels])
    options.out.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n')


def _text(x: float, y: float, text: str, *, size: int = 11, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="middle">{text}</text>'


if __name__ == "__main__":
    main()
