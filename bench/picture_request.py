"""Draws docs/request.svg: one request, from a user's history to the slate.

python bench/picture_request.py [--out docs/request.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 800, 346
TOP, LOW, TALL = 26, 196, 92  # y of both rows of boxes, and their height
NARROW, STEP = 98, 116  # width of a box of the lower row, and from one to the next
ENCODER, CACHE, LOWER = 209, 376, 214  # x of the encoder, the cache and the first box of the lower row
LIGHT = {
    "panel": "fill:#ffffff;stroke:#d1d9e0",
    "box": "fill:#f6f8fa;stroke:#c4ccd4",
    "cache": "fill:#eaf3ff;stroke:#0969da",
    "name": "fill:#1f2328",
    "note": "fill:#59636e",
    "arrow": "stroke:#59636e",
    "tip": "fill:#59636e",
    "read": "stroke:#0969da",
    "readtip": "fill:#0969da",
    "readnote": "fill:#0550ae",
    "old": "fill:#80b3f0",
    "new": "fill:#f0a63a",
}
DARK = {
    "panel": "fill:#0d1117;stroke:#3d444d",
    "box": "fill:#161b22;stroke:#3d444d",
    "cache": "fill:#121d2f;stroke:#4493f8",
    "name": "fill:#f0f6fc",
    "note": "fill:#9198a1",
    "arrow": "stroke:#9198a1",
    "tip": "fill:#9198a1",
    "read": "stroke:#4493f8",
    "readtip": "fill:#4493f8",
    "readnote": "fill:#79b8ff",
    "old": "fill:#3a6fb5",
    "new": "fill:#d29922",
}
STAGES = (
    ("Query", ("a vector to", "search with")),
    ("Index", ("nearest", "items")),
    ("Candidates", ("such as 200", "of all items")),
    ("Ranker", ("a chance for", "each action")),
    ("Slate", ("the k best", "items")),
)
DESCRIPTION = (
    "The encoder reads the history once. Its keys and values stay in the cache. The last state gives the retrieval "
    "query, the index finds candidates, and the ranker scores them by attending to the cached keys and values."
)


def rules(palette: dict[str, str]) -> str:
    """A palette as CSS."""
    return "".join(f".{name}{{{style}}}" for name, style in palette.items())


def text(x: float, y: float, words: str, kind: str = "note", anchor: str = "middle") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, name: str, notes: tuple[str, ...]) -> list[str]:
    """A named step."""
    middle = x + width / 2
    return [
        f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{TALL}" rx="8"/>',
        text(middle, y + 32, name, "name"),
        *(text(middle, y + 54 + 17 * line, words) for line, words in enumerate(notes)),
    ]


def cells(x: float, y: float, count: int, width: float, new: int = 2) -> list[str]:
    """A row of events, of which the last are new."""
    return [
        f'<rect class="{"new" if place >= count - new else "old"}" '
        f'x="{x + place * (width + 4):g}" y="{y}" width="{width}" height="12" rx="2"/>'
        for place in range(count)
    ]


def arrow(points: list[tuple[float, float]], kind: str = "", dashed: bool = False) -> str:
    """A line along points, with a head at the last; `kind` is "" or "read"."""
    (x, y), (before_x, before_y) = points[-1], points[-2]
    down, right = (y > before_y) - (y < before_y), (x > before_x) - (x < before_x)
    head = f"{x},{y} {x - 8 * right - 5 * down},{y - 8 * down - 5 * right} "
    head += f"{x - 8 * right + 5 * down},{y - 8 * down + 5 * right}"
    line = " ".join(f"{px},{py}" for px, py in [*points[:-1], (x - 6 * right, y - 6 * down)])
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<polyline class="{kind or "arrow"}" points="{line}"{dashes}/><polygon class="{kind}tip" points="{head}"/>'


def upper() -> list[str]:
    """History, encoder, and the cache of keys and values."""
    middle = TOP + TALL / 2
    parts = box(24, TOP, 148, "History", ("what the user did",)) + cells(42, TOP + 68, 7, 12.6)
    parts += box(ENCODER, TOP, 108, "Encoder", ("reads the", "history once"))
    parts.append(f'<rect class="cache" x="{CACHE}" y="{TOP}" width="{776 - CACHE}" height="{TALL}" rx="8"/>')
    parts.append(text(CACHE + 16, TOP + 32, "Keys and values", "name", "start"))
    parts.append(text(CACHE + 16, TOP + 54, "of every layer, kept", anchor="start"))
    parts.append(text(CACHE + 16, TOP + 71, "for the next request", anchor="start"))
    for layer in range(3):
        parts += cells(CACHE + 202, TOP + 23 + 17 * layer, 7, 22)
    parts.append(arrow([(172, middle), (ENCODER, middle)]))
    parts.append(arrow([(ENCODER + 108, middle - 16), (CACHE, middle - 16)]))
    parts.append(arrow([(CACHE, middle + 16), (ENCODER + 108, middle + 16)], "read", dashed=True))
    return parts


def lower() -> list[str]:
    """Query to slate, and what the ranker reads."""
    parts, middle = [], LOW + TALL / 2
    for place, (name, notes) in enumerate(STAGES):
        left = LOWER + place * STEP
        parts += box(left, LOW, NARROW, name, notes)
        if place:
            parts.append(arrow([(left - STEP + NARROW, middle), (left, middle)]))
    down, ranker = LOWER + NARROW / 2, LOWER + 3 * STEP + NARROW / 2
    parts.append(arrow([(down, TOP + TALL), (down, LOW)]))
    parts.append(arrow([(ranker, TOP + TALL), (ranker, LOW)], "read"))
    parts.append(text(ranker - 12, (TOP + TALL + LOW) / 2 + 5, "attends to the history", "readnote", "end"))
    parts.append(text(down - 12, (TOP + TALL + LOW) / 2 + 5, "last hidden state", anchor="end"))
    for name, first, last in (("retrieval", 0, 2), ("ranking", 3, 4)):
        left, right, y = LOWER + first * STEP, LOWER + last * STEP + NARROW, LOW + TALL + 12
        parts.append(f'<polyline class="arrow" points="{left},{y} {left},{y + 6} {right},{y + 6} {right},{y}"/>')
        parts.append(text((left + right) / 2, y + 26, name))
    return parts


def legend() -> list[str]:
    """What the colours mean, in the free corner."""
    return [
        *cells(24, LOW + 8, 1, 12.6, new=0),
        text(46, LOW + 19, "encoded before", anchor="start"),
        *cells(24, LOW + 33, 1, 12.6, new=1),
        text(46, LOW + 44, "new event", anchor="start"),
        arrow([(24, LOW + 64), (40, LOW + 64)], "read", dashed=True),
        text(46, LOW + 69, "a returning user:", anchor="start"),
        text(46, LOW + 86, "encode new events only", anchor="start"),
    ]


def picture() -> str:
    """The document, with a palette for light pages and one for dark pages."""
    fonts = "font-family:-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"
    style = (
        f"text{{{fonts};font-size:13px}}.name{{font-size:14.5px;font-weight:600}}polyline{{fill:none;stroke-width:1.5}}"
        f".read{{stroke-width:2}}{rules(LIGHT)}@media (prefers-color-scheme:dark){{{rules(DARK)}}}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title description">',
        '<title id="title">One request</title>',
        f'<desc id="description">{DESCRIPTION}</desc>',
        f"<style>{style}</style>",
        f'<rect class="panel" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
        *upper(),
        *lower(),
        *legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "request.svg")
    parser.parse_args().out.write_text(picture())


if __name__ == "__main__":
    main()
