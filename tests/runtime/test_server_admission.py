from __future__ import annotations

import pytest

from unipinrec.errors import ConfigError
from unipinrec.runtime.server_admission import Admission
from unipinrec.runtime.server_api import Refusal


def test_there_is_room_for_so_many() -> None:
    admission = Admission(3)
    with admission.admit(1.0) as place:
        place.add(2)
        with pytest.raises(Refusal, match="3 requests are waiting, of at most 3"), admission.admit(1.0):
            pass
        assert (admission.pending, admission.refused) == (3, 1)
    assert (admission.pending, admission.most_pending) == (0, 3)


def test_what_does_not_fit_takes_no_room() -> None:
    admission = Admission(3)
    with pytest.raises(Refusal, match="1 requests are waiting"), admission.admit(1.0) as place:
        place.add(3)
    assert admission.pending == 0
    with admission.admit(1.0) as place:
        place.add(2)


def test_nobody_waits_for_what_comes_too_late() -> None:
    admission = Admission(100)
    admission.measured(0.5)
    with admission.admit(1.0) as place:
        place.add(3)
        with pytest.raises(Refusal, match="4 requests are ahead, which take about 2000 ms") as refused:
            admission.take(1, within_s=1.9)
        assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "2"})
        admission.take(1, within_s=2.1)
        admission.give_back(1)
    with admission.admit(0.1):  # nothing is ahead of it
        pass


def test_the_mean_follows_what_is_measured() -> None:
    admission = Admission(1)
    admission.measured(1.0)
    assert admission.seconds_each == 1.0
    for _ in range(200):
        admission.measured(0.1)
    assert admission.seconds_each == pytest.approx(0.1, rel=0.2)


def test_a_queue_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold at least 1"):
        Admission(0)
