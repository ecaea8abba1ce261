"""Guesses what the columns of a table mean, and writes a column map to edit: `unipinrec prepare inspect`.

A guess rests on names and on values. The map is read once, as `prepare table` reads it, so that a
misfit is said at once. What cannot be decided, such as days before months, is a comment in the map.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from unipinrec.errors import LONGEST_VALUE, DataError, listed
from unipinrec.models.data import schema
from unipinrec.models.data.dialect import guess_form
from unipinrec.models.data.files import JSON_ENDINGS, TEXT_ENDINGS, FileForm, read_table
from unipinrec.models.data.table import ISO_8601, MOST_ACTIONS, ColumnMap, read_mapped
from unipinrec.models.data.validate import build_dataset

MOST_TIMES = 20_000  # distinct texts that are tried as times
WIDE = r"^\s*\S+-[01](\s+\S+-[01])*\s*$"
USER = r"user|customer|client|visitor|member|account|buyer|reviewer|player|person|listener|kunde|^uid$|^who$|household"
ITEM = (
    r"item|product|sku|article|movie|track|song|artist|video|asin|isbn|book|news|stock|content|listing|game|artikel"
    r"|impressions|^iid$|^pid$|^what$"
)
TIME = r"time|date|^ts$|^when$|created|_at$|datum|zeit"
ORDER = r"^(order|pos|position|seq|sequence|step|nr)$"
EVENT = r"event|action|behaviou?r|activity|verb|interaction|^kind$|^type$"
RATING = r"rating|stars|^score$"
COUNT = r"plays|count|weight|listens|quantity|qty|freq|amount|menge|anzahl"
WANTED = r"buy|purchase|order|transaction|checkout|like|save|click|play"
SHOWN = r"price|preis|cost|year"
NOT_AN_ID = r"name|title|desc|price|categ|type|count|time|date|genre|brand|age|gender|country|rating"
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S%.f", " %I:%M:%S %p", " %I:%M %p")
DATES = (
    *("%d/%m/%Y", "%m/%d/%Y", "%Y/%m/%d", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y%m%d", "%d %b %Y", "%b %d, %Y"),
    *("%d/%m/%y", "%m/%d/%y", "%d.%m.%y", "%d-%b-%Y"),
)
FORMATS = (
    *(date + clock for date in DATES for clock in CLOCKS),
    *("%a %b %d %H:%M:%S %Y", "%a %b %d %H:%M:%S %z %Y", "%d/%b/%Y:%H:%M:%S %z"),
)
SWAPPED = str.maketrans({"d": "m", "m": "d"})


@dataclass(frozen=True)
class Sheet:
    """A table: its file (or the pattern of several), its form, and its rows."""

    path: Path
    pattern: str | None
    form: FileForm
    ends: str
    rows: pl.DataFrame

    @cached_property
    def texts(self) -> dict[str, pl.Series]:
        """The columns without lists, as text without gaps."""
        flat = (column for column in self.rows if not column.dtype.is_nested())
        return {c.name: c.cast(pl.String, strict=False).str.strip_chars().replace("", None).drop_nulls() for c in flat}

    def named(self, pattern: str) -> list[str]:
        """The columns whose name holds the pattern; ids first."""
        fit = [name for name in self.rows.columns if re.search(pattern, _words(name))]
        return sorted(
            fit, key=lambda name: (bool(re.search(NOT_AN_ID, _words(name))), not re.search("id$|code$", _words(name)))
        )


@dataclass
class Roles:
    """The columns of the events."""

    user: str
    item: str
    time: str | None = None
    time_key: str = ""
    form: FileForm = field(default_factory=FileForm)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What `inspect` found: the forms of the files, the column map as text, a sample, and counts of the events.

    `problem` says why `prepare table` would refuse the map as it is; the counts are then empty.
    """

    files: dict[str, str]
    toml: str
    notes: tuple[str, ...]
    sample: list[dict[str, str]]
    counts: dict[str, int]
    problem: str | None


def inspect_source(source: Path) -> Inspected:
    """Guess the column map of a file or a folder of files.

    Raises:
        DataError: No file is readable, or the events have fewer than two columns that could be user and item.
    """
    sheets = _sheets(source)
    events = max(sheets, key=lambda sheet: (bool(sheet.named(USER)), bool(sheet.named(ITEM)), sheet.rows.height))
    roles, body = _events(events)
    lines = [
        "# A guess from names and values: check every line. docs/data.md explains the keys.",
        f"# columns: {', '.join(map(_toml, events.rows.columns[:100]))}",
        f"name = {_toml(source.resolve().stem)}",
        'source = "own data"  # origin and licence',
    ]
    lines += [*body, *_form_lines(events, source.is_dir())]
    if items := next((one for one in sheets if one is not events and _catalogue_id(one, events, roles.item)), None):
        lines += _item_lines(items, events, roles.item)
    toml = "\n".join(lines) + "\n"
    counts: dict[str, int] = {}
    problem = None
    try:
        raw = read_mapped(source, msgspec.toml.decode(toml, type=ColumnMap))
        made = build_dataset(raw)
        counts = {"rows": raw.events.height, "users": made.events["user_id"].n_unique(), "items": made.items.height}
        counts |= {"slates": made.slates["slate_id"].n_unique(), **made.spec.dropped}
    except (DataError, msgspec.DecodeError) as error:
        problem = str(error)
    return Inspected(
        files={(sheet.pattern or sheet.path.name): _described(sheet) for sheet in sheets},
        toml=toml,
        notes=tuple(roles.notes),
        sample=[
            {name: str(value)[:40] for name, value in row.items()} for row in events.rows.head(3).iter_rows(named=True)
        ],
        counts=counts,
        problem=problem,
    )


def _sheets(source: Path) -> list[Sheet]:
    if not source.is_dir():
        return [_sheet([source], None)]
    groups: dict[str, list[Path]] = {}
    endings = (*TEXT_ENDINGS, *JSON_ENDINGS)
    for path in sorted(source.iterdir()):
        if path.suffix == ".parquet" or path.name.removesuffix(".gz").endswith(endings):
            groups.setdefault(re.sub(r"\d+", "*", path.name), []).append(path)
    if not groups:
        raise DataError(
            f"{source}: has no file with an ending of {', '.join((*endings, '.parquet'))}; give the file itself"
        )
    return [_sheet(paths, pattern if len(paths) > 1 else None) for pattern, paths in groups.items()]


def _sheet(paths: list[Path], pattern: str | None) -> Sheet:
    form, ends = guess_form(paths[0])
    return Sheet(
        paths[0],
        pattern,
        form,
        ends,
        pl.concat([read_table(path, None, form=form) for path in paths], how="vertical_relaxed"),
    )


def _events(sheet: Sheet) -> tuple[Roles, list[str]]:
    """The roles, and the lines of the map up to [events]."""
    rows, texts = sheet.rows, sheet.texts
    wide = next((name for name, text in texts.items() if text.len() and text.head(200).str.contains(WIDE).all()), None)
    lists = next((c.name for c in rows if isinstance(c.dtype, pl.List) and re.search(ITEM, _words(c.name))), None)
    times = [(name, found) for name in [*sheet.named(TIME), *texts] if (found := _time(name, texts.get(name), sheet))]
    time, (time_key, note) = times[0] if times else (None, ("", None))
    free = [name for name in texts if name not in (time, wide)]
    user = next((n for n in sheet.named(USER) if n in free), None) or _first(
        free, texts, rows.height, sheet.named(ITEM)
    )
    named = [name for name in sheet.named(ITEM) if name in free and name != user]
    item = wide or lists or next(iter(named), None) or _first([n for n in free if n != user], texts, rows.height, [])
    if user is None or item is None:
        raise DataError(f"{sheet.path}: columns {listed(rows.columns)}: no two of them look like user and item")
    roles = Roles(user, item, time, time_key, sheet.form, [note] if note else [])
    lines = ["[events]", f"user = {_toml(user)}", f"item = {_toml(item)}"]
    if time:
        lines += [f"timestamp = {_toml(time)}", time_key + (f"  # {note}" if note else "")]
    rest = [name for name in free if name not in (user, item)]
    if not time and (
        order := next((name for name in rest if re.search(ORDER, _words(name)) and _whole(texts[name])), None)
    ):
        lines.append(f"order = {_toml(order)}")
        rest.remove(order)
    if wide:
        lines += ['items_separator = " "', 'label_separator = "-"']
        slate = next((n for n in free if n != user and texts[n].len() == texts[n].n_unique() == rows.height), None)
        lines += [f"slate = {_toml(slate)}  # events are exposures of this slate"] if slate and time else []
    elif lists:
        lines.append('items_separator = ""  # lists')
    actions = ['positive_actions = ["click"]', "[actions]", 'click = "label"'] if wide else _actions(rest, texts)
    return roles, [*actions, *lines]


def _first(free: list[str], texts: dict[str, pl.Series], height: int, last: list[str]) -> str | None:
    """The first column that could hold ids: of several values, and not one for each row."""
    ids = [
        name
        for name in free
        if name not in last and not re.search(NOT_AN_ID, _words(name)) and not _decimal(texts[name])
    ]
    repeated = [name for name in ids if 1 < texts[name].n_unique() < height]
    return next(iter(repeated or ids or free), None)


def _time(name: str, text: pl.Series | None, sheet: Sheet) -> tuple[str, str | None] | None:
    """The line of the map that says the unit or format, and what is not certain."""
    if text is None or not text.len():
        return None
    hinted = re.search(TIME, _words(name))
    values = text.unique(maintain_order=True).head(MOST_TIMES)
    if isinstance(sheet.rows[name].dtype, pl.Date | pl.Datetime) or values.str.contains(ISO_8601).all():
        return 'timestamp_unit = "iso"', None
    numbers = values.cast(pl.Float64, strict=False)
    if not numbers.has_nulls() and (hinted or (not re.search(f"{USER}|{ITEM}", _words(name)) and values.len() > 1)):
        for unit, scale in schema.UNITS_MS.items():
            if (numbers * scale).is_between(schema.EARLIEST_MS, schema.LATEST_MS).all():
                return f"timestamp_unit = {_toml(unit)}", None
    if not hinted and not values.str.contains(r"\d\D+\d|[A-Za-z]{3}.*\d{4}|^(19|20)\d\d[01]\d[0-3]\d$").all():
        return None
    fit = {form: moments for form in FORMATS if (moments := _moments(values, form)) is not None}
    if not fit:
        return None
    best = max(fit, key=lambda form: (fit[form].diff().drop_nulls().dt.total_seconds() >= 0).mean() or 0.0)
    other = best.translate(SWAPPED)
    doubt = f"{other} fits too: the days are all 12 or less" if other != best and other in fit else None
    return f"timestamp_format = {_toml(best)}", doubt


def _moments(values: pl.Series, form: str) -> pl.Series | None:
    if values.head(20).str.to_datetime(form, strict=False, time_unit="us").has_nulls():
        return None
    moments = values.str.to_datetime(form, strict=False, time_unit="us")
    return None if moments.has_nulls() or not moments.dt.year().is_between(1990, 2099).all() else moments


def _actions(rest: list[str], texts: dict[str, pl.Series]) -> list[str]:
    few = [name for name in rest if texts[name].len() and texts[name].n_unique() <= MOST_ACTIONS]
    flags = [
        name for name in few if texts[name].str.to_lowercase().is_in(["0", "1", "true", "false", "1.0", "0.0"]).all()
    ]
    plain = [name for name in few if re.match("column_", name) and not texts[name].str.contains(r"\d").any()]
    for name in (name for name in few if name not in flags and (re.search(EVENT, _words(name)) or name in plain)):
        counts = texts[name].value_counts(sort=True)
        words = counts[name].to_list()
        good = next(
            (word for word in words if re.search(WANTED, word.lower()) and not re.search("remove|^un|^dis", word)),
            words[0],
        )
        held = ", ".join(f"{_toml(word[:LONGEST_VALUE])} {count:,}" for word, count in counts.head(8).iter_rows())
        return [f"positive_actions = [{_toml(good)}]  # of {held}", f"actions_from = {_toml(name)}"]
    if flags := [name for name in flags if texts[name].n_unique() > 1 or texts[name][0].lower() in ("1", "true")]:
        good = next((name for name in flags if re.search(WANTED, _words(name))), flags[0])
        return [
            f"positive_actions = [{_toml(good)}]",
            "[actions]",
            *(f"{_toml(name)} = {_toml(name)}" for name in flags[:8]),
        ]
    for name in rest:
        numbers = texts[name].cast(pl.Float64, strict=False)
        if not numbers.len() or numbers.has_nulls():
            continue
        top = float(numbers.max() or 0)  # type: ignore[arg-type]  # a number
        if re.search(RATING, _words(name)) and top > 0:
            good = f"like = {{ column = {_toml(name)}, at_least = {0.8 * top:g} }}  # ratings reach {top:g}"
            return ['positive_actions = ["like"]', "[actions]", "rate = true", good]
        if re.search(COUNT, _words(name)) and top >= 1:
            action = (
                "buy"
                if re.search("quantity|qty|menge|anzahl", _words(name))
                else "play"
                if "play" in name.lower()
                else "use"
            )
            return [
                f'positive_actions = ["{action}"]',
                "[actions]",
                f"{action} = {{ column = {_toml(name)}, at_least = 1 }}",
            ]
    return ['positive_actions = ["interact"]', "[actions]", "interact = true  # every row"]


def _form_lines(sheet: Sheet, in_folder: bool) -> list[str]:
    form, default = sheet.form, FileForm()
    lines = (
        [f"files = {_toml(sheet.pattern)}" if sheet.pattern else f"file = {_toml(sheet.path.name)}"]
        if in_folder
        else []
    )
    for name in ("separator", "encoding", "quote"):
        if (value := getattr(form, name)) != getattr(default, name):
            lines.append(f"{name} = {_toml(value)}")
    return lines + ([f"header = {_toml(list(form.header))}  # names to choose"] if form.header else [])


def _catalogue_id(sheet: Sheet, events: Sheet, item: str) -> str | None:
    """The column that holds the items of the events, each once."""
    known = (
        events.rows[item].cast(pl.String, strict=False) if not events.rows[item].dtype.is_nested() else pl.Series([""])
    )
    fit = [name for name in [item, *sheet.named(ITEM), *sheet.texts] if name in sheet.texts]
    return next(
        (n for n in fit if sheet.texts[n].is_unique().all() and sheet.texts[n].is_in(known.implode()).any()), None
    )


def _item_lines(sheet: Sheet, events: Sheet, item: str) -> list[str]:
    name = _catalogue_id(sheet, events, item)
    rest = [column for column in sheet.rows if column.name != name]
    title = next((c.name for c in rest if re.search("title|name", _words(c.name)) and c.name in sheet.texts), None)
    dense, words = [], []
    for column in rest:
        numbers = isinstance(column.dtype, pl.Array | pl.List) and column.dtype.inner.is_numeric()
        text = sheet.texts.get(column.name)
        if numbers or column.dtype.is_float() or (text is not None and text.len() and _decimal(text)):
            dense.append(column)
        elif (
            column.name != title
            and text is not None
            and 1 < text.n_unique() <= min(1000, max(20, sheet.rows.height // 2))
        ):
            words += [] if text.str.contains("^https?://").all() else [column.name]
    pairs = {"dense": [column.name for column in dense], "categories": words}
    lines = [
        "[items]",
        f"item = {_toml(name)}",
        *([f"title = {_toml(title)}"] if title else []),
        *_form_lines(sheet, True),
    ]
    lines += [
        f"{key} = {{ {', '.join(f'{_toml(one)} = {_toml(one)}' for one in names)} }}"
        for key, names in pairs.items()
        if names
    ]
    taught = {title, *words, *pairs["dense"]}
    further = [one.name for one in rest if one.name not in taught or re.search(SHOWN, _words(one.name))]
    texts = {one: sheet.texts[one] for one in further if one in sheet.texts and sheet.texts[one].len()}
    fit = [one for one, text in texts.items() if (text.str.len_chars() <= schema.LONGEST_METADATA).all()]
    if kept := [one for one in fit if "=" not in one][: schema.MOST_METADATA]:
        lines.append(f"metadata = {_toml(kept)}  # kept for display and filters, not taught")
    gaps = any(column.has_nulls() for column in dense)
    return [*lines, *(['missing = "mean"'] if gaps else [])]


def _described(sheet: Sheet) -> str:
    if sheet.ends == "none":
        return f"{sheet.rows.height:,} rows"
    form = sheet.form
    header = "no header" if form.header else "header"
    return (
        f"{sheet.rows.height:,} rows, {form.encoding}, separator {form.separator or 'of the ending'!r}, "
        f"quote {form.quote!r}, lines end in {sheet.ends}, {header}"
    )


def _words(name: str) -> str:
    """A name in lower case, with _ between its words."""
    return re.sub(r"[\s.-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).lower()


def _whole(text: pl.Series) -> bool:
    return text.len() > 0 and not text.cast(pl.Int64, strict=False).has_nulls()


def _decimal(text: pl.Series) -> bool:
    return not _whole(text) and not text.cast(pl.Float64, strict=False).has_nulls()


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
