"""Which part of a long history is encoded."""

from __future__ import annotations


def window_start(count: int, limit: int, slack: int) -> int:
    """Place of the first event that is encoded of a history of `count` events where the model takes `limit`.

    The window moves on by `slack` events at a time, so that between two moves new events only extend what is encoded:
    a history that grows is encoded anew once in `slack` events. It holds more than `limit - slack` events.
    """
    return -(-max(0, count - limit) // slack) * slack


def default_slack(limit: int) -> int:
    """An eighth of the model's limit."""
    return max(1, limit // 8)
