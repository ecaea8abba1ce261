"""The tables of docs/quality.md and docs/benchmarks.md, written from bench/results/quality.

    python bench/quality_tables.py [--check]

In a document a table stands between a line `<!-- table: NAME -->` and the next empty line. --check changes nothing and
fails where a document says something else than the results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import ROOT
from quality_runs import RESULTS, figures

DOCUMENTS = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "quality.md")
TABLE = re.compile(r"(?<=^<!-- table: )(\w+)( -->\n\n)(.*?)(?=\n\n)", re.MULTILINE | re.DOTALL)
ACTIONS = ("click", "long_view", "like")
RETRIEVAL = ("HR@10", "NDCG@10", "HR@50", "NDCG@50")
LIVE = tuple(f"{action} auc" for action in ACTIONS)
FROZEN = tuple(f"{action} frozen gauc" for action in ACTIONS)
LOGLOSS = tuple(f"{action} logloss" for action in ACTIONS)
WITHIN = tuple(f"{action} request gauc" for action in ACTIONS)
PAIRS = tuple(f"{action} AUC / GAUC" for action in ACTIONS)
SASREC, EASE = "RecTools' SASRec", "RecTools' EASE"
BEFORE, RUNNING = "LightGBM, rates from before the training days", "LightGBM, rates up to the request"
RANKERS = {
    "joint": "joint",
    "masked_weight_0.25": "joint, masked events weigh .25",
    "mask_0": "joint, p_mask 0",
    "ranking_only": "ranking alone",
    "ranking_only_mask_0": "ranking alone, p_mask 0",
    "wide": "joint, twice as wide",
    "wide_ranking_only": "ranking alone, twice as wide",
}
RETRIEVERS = {
    "joint": "joint",
    "masked_weight_0.25": "joint, masked events weigh .25",
    "mask_0": "joint, p_mask 0",
    "retrieval_only": "retrieval alone",
    "retrieval_only_mask_0": "retrieval alone, p_mask 0",
    "wide": "joint, twice as wide",
    "wide_retrieval_only": "retrieval alone, twice as wide",
}
SWEEP = {"mask_0": "p_mask 0", "mask_0.1": ".1", "joint": ".2 (joint)", "mask_0.3": ".3"}
FORMS = {
    "joint": "joint",
    "mask_0": "joint, p_mask 0",
    "time_rotary": "rotary by time and index",
    "self_attention": 'every event sees itself ("self")',
    "interleaved": "items and actions interleaved, as many events, p_mask 0",
    "no_content": "items are ids alone",
    "marked": "masked events are marked",
}
SIMULATED = {"marked": "masked events are marked", "unmarked": "as in the paper", "unmasked": "no masking"}
Figure = Mapping[str, float]  # mean, median, min, max
Row = Mapping[str, Figure]


def number(value: float) -> str:
    """A share of one as tables have it."""
    return f"{value:.4f}".removeprefix("0")


def mean(row: Row, *names: str) -> str:
    """Means, or nothing where there are none."""
    return " / ".join(number(row[name]["mean"]) for name in names if name in row)


def spread(row: Row, name: str) -> str:
    """The mean, with the smallest and largest seed behind it where there are several."""
    if name not in row:
        return ""
    ends = [number(row[name][end]) for end in ("min", "max")]
    return mean(row, name) + (f" {ends[0]}-{ends[1]}" if ends[0] != ends[1] else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a column may have no title."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def table_of(rows: Mapping[str, Row], header: Sequence[str], cells: Callable[[Row], Sequence[str]]) -> str:
    """A table of one line per row."""
    return markdown(("", *header), [(name, *cells(row)) for name, row in rows.items()])


def compared(rows: Mapping[str, Row]) -> str:
    """Means side by side, and under them how far apart two seeds of a row are at most."""
    widest = {
        name: {"mean": max(row[name]["max"] - row[name]["min"] for row in rows.values() if name in row)}
        for name in (*RETRIEVAL, *LIVE, *FROZEN)
    }
    shown = RETRIEVAL[:3]
    pairs = list(zip(LIVE, FROZEN, strict=True))
    return table_of(
        {**rows, "two seeds of a row differ by up to": widest},
        (*shown, *PAIRS),
        lambda row: [*(mean(row, name) for name in shown), *(mean(row, *pair) for pair in pairs)],
    )


def tables() -> dict[str, str]:
    """Every table by its name."""
    rows = _read("kuairand_last_fit")["rows"]
    trees, popularity = _lightgbm(), _popularity()
    named = {name: rows[key] for key, name in {**RETRIEVERS, **RANKERS}.items()}
    retrieval = {
        **{name: named[name] for name in RETRIEVERS.values()},
        SASREC: _retrieval("kuairand_rectools_sasrec_seed0"),
        EASE: _retrieval("kuairand_rectools_ease"),
        "popularity": popularity,
    }
    ranking = {**{name: named[name] for name in RANKERS.values()}, **trees, "popularity": popularity}
    lightgbm = {name: figure for name, figure in trees[BEFORE].items() if "frozen" in name} | dict(trees[RUNNING])
    main = {**named, SASREC: retrieval[SASREC], EASE: retrieval[EASE], "LightGBM": lightgbm, "popularity": popularity}
    return {
        "retrieval": table_of(retrieval, RETRIEVAL, lambda row: [spread(row, name) for name in RETRIEVAL]),
        "live": table_of(
            {name: row for name, row in ranking.items() if name != BEFORE},
            (*(f"{action} AUC" for action in ACTIONS), *LOGLOSS),
            lambda row: [*(spread(row, name) for name in LIVE), *(mean(row, name) for name in LOGLOSS)],
        ),
        "frozen": table_of(
            {name: row for name, row in ranking.items() if name != RUNNING},
            [f"{action} GAUC" for action in ACTIONS],
            lambda row: [spread(row, name) for name in FROZEN],
        ),
        "within": table_of(
            {name: row for name, row in ranking.items() if name not in (BEFORE, "popularity")},
            ACTIONS,
            lambda row: [spread(row, name) for name in WITHIN],
        ),
        "sweep": compared({name: rows[key] for key, name in SWEEP.items()}),
        "forms": compared({name: rows[key] for key, name in FORMS.items() if key in rows}),
        "lightgbm": table_of(
            trees, PAIRS, lambda row: [mean(row, f"{action} auc", f"{action} gauc") for action in ACTIONS]
        ),
        "both_jobs": table_of(
            main,
            ("HR@10", "NDCG@10", *PAIRS),
            lambda row: [
                *(mean(row, name) for name in RETRIEVAL[:2]),
                *(mean(row, *pair) for pair in zip(LIVE, FROZEN, strict=True)),
            ],
        ),
        "simulated": _simulated(),
        "ml1m": _ml1m(),
    }


def written(text: str, found: Mapping[str, str]) -> str:
    """A document with its tables replaced."""
    return TABLE.sub(lambda match: match[1] + match[2] + found[match[1]], text)


def main() -> None:
    """Write or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    found = tables()
    for path in DOCUMENTS:
        text = path.read_text()
        new = written(text, found)
        if options.check and new != text:
            raise SystemExit(f"{path.name} differs from bench/results/quality; run python bench/quality_tables.py")
        path.write_text(new)


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_bytes())
    return document


def _once(values: Mapping[str, float | None]) -> dict[str, Figure]:
    return {name: dict.fromkeys(("mean", "median", "min", "max"), v) for name, v in values.items() if v is not None}


def _retrieval(name: str) -> Row:
    return _once(figures({"retrieval": _read(name)["metrics"]}, ()))


def _popularity() -> Row:
    metrics = json.loads((RESULTS.parent / "quality_kuairand_pure.json").read_bytes())["scorers"]["popularity"]
    found = figures({"retrieval": metrics["retrieval"]}, ())
    for action in ACTIONS:
        of = metrics["ranking"][action]
        found |= {f"{action} auc": of["auc"], f"{action} logloss": of["logloss"], f"{action} frozen gauc": of["gauc"]}
    return _once(found)


def _lightgbm() -> dict[str, Row]:
    document = _read("kuairand_lightgbm")
    found: dict[str, Row] = {}
    for key, name in (("before", BEFORE), ("running", RUNNING)):
        values: dict[str, float | None] = {}
        for action in ACTIONS:
            of = document[key][action]["refitted"]
            values |= {f"{action} {field}": of[field] for field in ("auc", "gauc", "logloss")}
            values[f"{action} request gauc"] = of.get("request_gauc")
            if key == "before":
                values[f"{action} frozen gauc"] = of["gauc"]
        found[name] = _once(values)
    return found


def _simulated() -> str:
    actions = ("click", "save", "share", "hide")
    document = _read("simulated")
    rows: dict[str, Row] = {name: document["rows"][key] for key, name in SIMULATED.items()}
    for name, metrics in document["bounds"].items():
        found = figures({"retrieval": metrics["retrieval"]}, ())
        for action in actions:
            found |= {f"{action} {field}": metrics["ranking"][action][field] for field in ("auc", "logloss")}
        rows[name] = _once(found)
    shown = [f"{action} {field}" for action in actions for field in ("auc", "logloss")]
    header = [f"{action} {field}" for action in actions for field in ("AUC", "log loss")]
    return table_of(rows, ("HR@10", *header), lambda row: [spread(row, name) for name in ("HR@10", *shown)])


def _ml1m() -> str:
    document = _read("ml1m")
    fields = ("HR@10", "NDCG@10")
    lines = [(name, *(number(row[field]) for field in fields)) for name, row in document["published"].items()]
    for name, kept in ((f"{SASREC}, measured here", "sasrec_seed0"), (f"{EASE}, measured here", "ease")):
        if (RESULTS / f"ml1m_rectools_{kept}.json").exists():
            row = _retrieval(f"ml1m_rectools_{kept}")
            lines.append((name, *(mean(row, field) for field in fields)))
    of = document["summary"]
    lines.append(("this model, median of three seeds", *(f"**{number(of[field]['median'])}**" for field in fields)))
    lines.append(
        ("its smallest and largest", *(f"{number(of[field]['min'])}-{number(of[field]['max'])}" for field in fields))
    )
    return markdown(("", *fields), sorted(lines[:-2], key=lambda line: line[1]) + lines[-2:])


if __name__ == "__main__":
    main()
