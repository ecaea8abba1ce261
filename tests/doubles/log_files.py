"""Eight shapes of files of events, as different as the logs of shops and services are; 60 rows each."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

ROWS = range(60)


def user(row: int) -> str:
    return f"u{row % 7:02}"


def item(row: int) -> str:
    return f"i{row * 5 % 13:02}"


def semicolons(folder: Path) -> Path:
    lines = ["Kunde;Artikel;Zeitpunkt;gekauft"]
    lines += [f'{user(n)};"Müsli; {item(n)}";{n % 27 + 1:02}.{n // 30 + 3:02}.2024 12:{n:02};{n % 2}' for n in ROWS]
    path = folder / "kaeufe.csv"
    path.write_bytes("\r".join([*lines, ""]).encode("latin-1"))
    return path


def no_header(folder: Path) -> Path:
    path = folder / "log.csv"
    path.write_text("".join(f"{n % 7 + 1},{n * 5 % 13 + 100},{n % 5 + 1},{1_600_000_000 + n}\n" for n in ROWS))
    return path


def impressions(folder: Path) -> Path:
    path = folder / "behaviors.tsv"
    lines = (
        f"{n + 1}\t{user(n)}\t11/{n % 28 + 1}/2019 {n % 12 + 1}:05:{n:02} {'AP'[n % 2]}M\tN1 N2\t"
        f"N{n}-1 N{n + 1}-0 N{n + 2}-0"
        for n in ROWS
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def play_counts(folder: Path) -> Path:
    path = folder / "user_artists.dat"
    path.write_text("userID\tartistID\tweight\n" + "".join(f"{n % 7}\t{n}\t{n * n + 1}\n" for n in ROWS))
    return path


def constant(folder: Path) -> Path:
    path = folder / "clicks.csv"
    path.write_text(
        "session_user,article,ts\n" + "".join(f"{user(n)},{item(n)},{1_600_000_000_000 + n}\n" for n in ROWS)
    )
    return path


def purchases(folder: Path) -> Path:
    path = folder / "retail.csv"
    head = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
    path.write_text(
        head
        + "".join(
            f'{536365 + n // 3},{item(n)},"HEART, {item(n)}",{n % 4 - 1},{n % 28 + 1:02}/12/2010 08:{n:02},2.55,'
            f"{17850 + n % 7},UK\n"
            for n in ROWS
        )
    )
    return path


def json_lines(folder: Path) -> Path:
    path = folder / "events.jsonl"
    events = ("view", "view", "cart", "purchase")
    rows = (
        {
            "user_id": n % 7,
            "product_id": f"00{n % 13}",
            "event_type": events[n % 4],
            "time": f"2024-05-{n % 28 + 1:02}T10:00:{n:02}Z",
        }
        for n in ROWS
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path) -> Path:
    for part in range(3):
        rows = range(part * 20, part * 20 + 20)
        frame = pl.DataFrame(
            {
                "uid": [n % 7 for n in rows],
                "item_id": [n % 13 for n in rows],
                "timestamp": [1_600_000_000 + n for n in rows],
            }
        )
        frame.write_parquet(folder / f"part-{part}.parquet")
    vectors = pl.Series([[float(n), 1.0] for n in range(13)], dtype=pl.Array(pl.Float32, 2))
    pl.DataFrame({"item_id": range(13), "embed": vectors, "brand": ["x", "y"] * 6 + ["z"]}).write_parquet(
        folder / "items.parquet"
    )
    return folder


SHAPES = (semicolons, no_header, impressions, play_counts, constant, purchases, json_lines, parquet)
