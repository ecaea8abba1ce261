"""KuaiRand folders in both layouts, written by the tests in the exact form of the files."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.kuairand import read_kuairand
from unipinrec.models.data.schema import TimeSplit
from unipinrec.models.data.validate import build_dataset

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
EARLY = LOG_HEADER + "1,10,20220425,0,1650812741436,1,0,0,0,0,0,1,61802,49866,0,0,0,0,1\n"
LATE = (
    LOG_HEADER
    + "1,10,20220430,0,1651248000000,1,1,1,1,1,1,1,61802,49866,0,0,1,0,4\n"
    + "1,10,20220430,0,1651248000000,0,0,0,0,0,0,0,61802,49866,0,0,0,0,4\n"
    + "1,11,20220430,0,1651248060000,0,0,0,0,0,0,0,0,0,0,0,0,0,4\n"
    + "2,11,20220430,2300,1651334400000,0,0,0,0,0,0,0,0,0,0,0,0,0,1\n"
    + "2,99,20220501,0,1651334400001,0,0,0,0,0,0,0,0,0,0,0,0,0,1\n"
)
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag\n"
    "10,7349781,NORMAL,2022-04-10,LongImport,0.0,87000.0,720.0,1280.0,9155697141,9.0,39\n"
    '11,2103883,AD,2022-04-08,PictureSet,0.0,,720.0,1280.0,6355810746,,"12,65"\n'
    "12,7349781,NORMAL,,Web,0.0,9000.0,720.0,1280.0,6618412736,4.0,\n"
)
HISTORY = "user_id,pos,video_id,long_view,is_like\n1,1,11,0,1\n1,0,12,1,0\n3,0,12,0,0\n"


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    data = tmp_path / "KuaiRand-Pure" / "data"
    data.mkdir(parents=True)
    (data / "log_standard_4_08_to_4_21_pure.csv").write_text(EARLY)
    (data / "log_standard_4_22_to_5_08_pure.csv").write_text(LATE)
    (data / "log_random_4_22_to_5_08_pure.csv").write_text("never read")
    (data / "video_features_basic_pure.csv").write_text(VIDEOS)
    return tmp_path


@pytest.fixture
def reduced(tmp_path: Path) -> Path:
    (tmp_path / "impressions_20220425_20220508.csv.gz").write_bytes(
        gzip.compress((EARLY + LATE[len(LOG_HEADER) :]).encode())
    )
    (tmp_path / "history_last50_before_20220425.csv.gz").write_bytes(gzip.compress(HISTORY.encode()))
    (tmp_path / "history_users.csv.gz").write_bytes(gzip.compress(b"user_id,history_len,last_time_ms\n1,2,3\n"))
    (tmp_path / "videos.csv.gz").write_bytes(gzip.compress(VIDEOS.encode()))
    return tmp_path


@pytest.mark.parametrize("inside", ["", "KuaiRand-Pure", "KuaiRand-Pure/data"])
def test_the_owners_files_are_found_and_read(owner: Path, inside: str) -> None:
    dataset = build_dataset(read_kuairand(owner / inside))
    assert dataset.spec.actions == (
        *("click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter"),
    )
    assert dataset.spec.positive_actions == ("long_view",)
    assert dataset.spec.surfaces == ("unknown", "tab_1", "tab_4")
    assert dataset.spec.split == TimeSplit(valid_start_ms=1651248000000, test_start_ms=1651334400000)
    assert dataset.spec.dropped == {
        "events: duplicate": 1,
        "events: unknown item": 1,
        "slates: unknown item": 1,
    }
    assert dataset.events.select("user_id", "item_id", "surface", "timestamp_ms").rows() == [
        ("1", "10", "tab_1", 1650812741436),
        ("1", "10", "tab_4", 1651248000000),
        ("1", "11", "tab_4", 1651248060000),
        ("2", "11", "tab_1", 1651334400000),
    ]
    assert dataset.events.select(f"action_{name}" for name in dataset.spec.actions).rows()[:2] == [
        (True, True, False, False, False, False, False, False),
        (True, True, True, True, True, True, True, True),
    ]


def test_exposures_form_slates_by_pause_and_tab(owner: Path) -> None:
    dataset = build_dataset(read_kuairand(owner))
    assert dataset.slates.select("slate_id", "user_id", "item_id", "timestamp_ms", "position").rows() == [
        (0, "1", "10", 1650812741436, 0),
        (1, "1", "10", 1651248000000, 0),
        (1, "1", "11", 1651248000000, 1),
        (2, "2", "11", 1651334400000, 0),
    ]
    apart = build_dataset(read_kuairand(owner, gap_ms=60_000))
    assert apart.slates["slate_id"].to_list() == [0, 1, 2, 3]


def test_history_lists_precede_all_times_and_their_long_views_are_clicks(reduced: Path) -> None:
    dataset = build_dataset(read_kuairand(reduced))
    columns = ["user_id", "item_id", "surface", "timestamp_ms", "action_click", "action_long_view", "action_like"]
    assert dataset.events.select(columns).rows() == [
        ("1", "12", "unknown", None, True, True, False),
        ("1", "11", "unknown", None, None, False, True),
        ("1", "10", "tab_1", 1650812741436, True, True, False),
        ("1", "10", "tab_4", 1651248000000, True, True, True),
        ("1", "11", "tab_4", 1651248060000, False, False, False),
        ("2", "11", "tab_1", 1651334400000, False, False, False),
        ("3", "12", "unknown", None, None, False, False),
    ]
    assert dataset.events["action_follow"].is_null().to_list() == [True, True, False, False, False, False, True]
    assert dataset.slates.height == 4
    assert dataset.spec.dropped["events: out of order (sorted)"] == 1


def test_the_catalogue_is_the_video_file_with_videos_never_shown(reduced: Path) -> None:
    items = build_dataset(read_kuairand(reduced)).items
    assert items.select("item_id", "title", "dense_age_days").rows() == [
        ("10", None, [0.0]),
        ("11", None, [2.0]),
        ("12", None, [1.0]),
    ]
    assert [round(row[0], 4) for row in items["dense_log_duration"]] == [4.4773, 0.0, 2.3026]
    assert items.select(
        f"category_{name}" for name in ("tag", "author", "video_type", "upload_type", "music_type")
    ).rows() == [
        ("39", "7349781", "NORMAL", "LongImport", "9"),
        ("12", "2103883", "AD", "PictureSet", None),
        (None, "7349781", "NORMAL", "Web", "4"),
    ]


def test_what_history_lists_tell_of_an_item_and_of_its_author_is_a_feature(reduced: Path) -> None:
    """Three rows: item 11 is liked, item 12 has one long view in two; the prior of either action is 8 of 20 rows."""
    dataset = build_dataset(read_kuairand(reduced))
    assert dataset.spec.dense == {"log_duration": 1, "age_days": 1, "past_item": 3, "past_author": 3}
    unseen = [0.0, math.log(8 / 12), math.log(8 / 12)]
    liked = [math.log(2), math.log(8 / 13), math.log(9 / 12)]
    viewed = [math.log(3), math.log(9 / 13), math.log(8 / 14)]
    for name, expected in (("item", [unseen, liked, viewed]), ("author", [viewed, liked, viewed])):
        assert np.allclose(dataset.items[f"dense_past_{name}"].to_list(), expected), name


def test_without_history_lists_there_are_no_such_features(owner: Path) -> None:
    assert build_dataset(read_kuairand(owner)).spec.dense == {"log_duration": 1, "age_days": 1}


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "videos.csv").write_text(VIDEOS)
    with pytest.raises(DataError, match=r"no KuaiRand data; it must hold log_standard_\*.csv"):
        read_kuairand(tmp_path)


def test_a_log_without_a_column_is_refused(owner: Path) -> None:
    path = owner / "KuaiRand-Pure" / "data" / "log_standard_4_22_to_5_08_pure.csv"
    path.write_text(LATE.replace("is_hate", "hated"))
    with pytest.raises(DataError, match=r"log_standard_4_22_to_5_08_pure.csv: no column 'is_hate'; it has \['user_id'"):
        read_kuairand(owner)


def test_a_log_that_is_no_number_is_refused(owner: Path) -> None:
    path = owner / "KuaiRand-Pure" / "data" / "log_standard_4_22_to_5_08_pure.csv"
    path.write_text(LATE.replace("1651248060000", "noon"))
    with pytest.raises(DataError, match=r"(?s)log_standard_4_22_to_5_08_pure.csv: .*noon"):
        read_kuairand(owner)
