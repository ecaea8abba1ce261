"""The four graphs as four methods over arrays and device tensors.

Knows how histories are padded and which tensor goes where; refuses to know external ids, indexes and requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError
from unipinrec.runtime.bundle import Bundle
from unipinrec.runtime.manifest import ModelSpec
from unipinrec.runtime.ort_session import OrtBackend
from unipinrec.runtime.requests import History
from unipinrec.runtime.session import Backend, Tensor

Scalar = TypeVar("Scalar", bound=np.generic)
Inputs = dict[str, NDArray[Any] | Tensor]


@dataclass(frozen=True, kw_only=True)
class HistoryBatch:
    """B histories, right-padded to n events.

    item_rows, surfaces, timestamps_ms [B, n] i64, actions [B, n, C] f32, lengths [B] i64, each at least 1.
    """

    item_rows: NDArray[np.int64]
    actions: NDArray[np.float32]
    surfaces: NDArray[np.int64]
    timestamps_ms: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def last_timestamps_ms(self) -> NDArray[np.int64]:
        """Time of each row's last event, [B]."""
        last: NDArray[np.int64] = self.timestamps_ms[np.arange(len(self.lengths)), self.lengths - 1]
        return last


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What an encoded batch leaves on the device, for retrieval, ranking and extension.

    Attributes:
        key_values: Per-layer key and value [B, H_kv, slots, D] in layer order, right-padded, prefix slots included.
        lengths: [B] i64, events per row.
        last_timestamps_ms: [B] i64, time of each row's last event.
        last_hidden_state: [B, d].
    """

    key_values: tuple[Tensor, ...]
    lengths: NDArray[np.int64]
    last_timestamps_ms: NDArray[np.int64]
    last_hidden_state: Tensor


def pad_histories(histories: Sequence[History]) -> HistoryBatch:
    """Right-pad histories into one batch."""
    return HistoryBatch(
        item_rows=pad_rows([history.item_rows for history in histories]),
        actions=pad_rows([history.actions for history in histories]),
        surfaces=pad_rows([history.surfaces for history in histories]),
        timestamps_ms=pad_rows([history.timestamps_ms for history in histories]),
        lengths=np.array([len(history) for history in histories], np.int64),
    )


def pad_rows(rows: Sequence[NDArray[Scalar]]) -> NDArray[Scalar]:
    """Right-pad arrays [n_i, ...] with zeros into [B, max n_i, ...]."""
    padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


class Engine:
    """Runs a model's graphs on a backend over one item table; safe to call from several threads."""

    def __init__(self, backend: Backend, model: ModelSpec, item_vectors: NDArray[np.float32]) -> None:
        self.backend, self.model, self.item_vectors = backend, model, item_vectors

    @classmethod
    def open(cls, bundle: Bundle) -> Engine:
        """Load a bundle's graphs on the CPU.

        Raises:
            BackendError: ONNX Runtime is missing or does not load a graph.
        """
        return cls(OrtBackend(bundle.graph_files()), bundle.manifest.model, bundle.item_vectors)

    def encode(self, batch: HistoryBatch) -> Encoded:
        """Encode histories from their first event."""
        outputs = self.backend.run("encoder", self._event_inputs(batch))
        return Encoded(
            key_values=tuple(outputs[name] for name in self.model.kv_names("present")),
            lengths=batch.lengths,
            last_timestamps_ms=batch.last_timestamps_ms(),
            last_hidden_state=outputs["last_hidden_state"],
        )

    def extend(self, past: Encoded, batch: HistoryBatch) -> Encoded:
        """Encode the events that follow an encoded past; the result equals encoding both at once."""
        added, last_hidden_state = self.encode_new(past, batch)
        slots = past.lengths + self.model.kv_prefix_slots
        return Encoded(
            key_values=tuple(
                self.backend.append(old, new, slots, batch.lengths)
                for old, new in zip(past.key_values, added, strict=True)
            ),
            lengths=past.lengths + batch.lengths,
            last_timestamps_ms=batch.last_timestamps_ms(),
            last_hidden_state=last_hidden_state,
        )

    def encode_new(self, past: Encoded, batch: HistoryBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """The extend graph itself: the new events' keys/values [B, H_kv, m, D], and the last hidden state [B, d]."""
        outputs = self.backend.run("extend", {**self._event_inputs(batch), **self._past_inputs(past)})
        return tuple(outputs[name] for name in self.model.kv_names("present")), outputs["last_hidden_state"]

    def retrieve(self, encoded: Encoded, outcomes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Query vectors [B, Q, E]; `outcomes` [B, C] is read only by models that are conditioned on it."""
        inputs: Inputs = {"last_hidden_state": encoded.last_hidden_state}
        if self.model.outcome_conditioned:
            inputs["outcomes"] = outcomes
        return self.backend.run("retrieval", inputs)["queries"].numpy()

    def rank(
        self,
        encoded: Encoded,
        candidates: NDArray[np.int64],
        surfaces: NDArray[np.int64],
        now_ms: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Action logits [B, k, C] of candidate rows [B, k], shown at `surfaces` [B] and `now_ms` [B].

        Raises:
            BackendError: The run failed or gave values that are not finite.
        """
        inputs = {
            **self._past_inputs(encoded),
            "candidate_vectors": self.item_vectors[candidates],
            "surfaces": surfaces,
            "timestamps_ms": now_ms,
        }
        logits: NDArray[np.float32] = self.backend.run("ranker", inputs)["logits"].numpy()
        if not np.isfinite(logits).all():
            raise BackendError("ranker: the logits are not finite; the graph is broken, export the bundle again")
        return logits

    def _event_inputs(self, batch: HistoryBatch) -> Inputs:
        return {
            "item_vectors": self.item_vectors[batch.item_rows],
            "actions": batch.actions,
            "surfaces": batch.surfaces,
            "timestamps_ms": batch.timestamps_ms,
            "lengths": batch.lengths,
        }

    def _past_inputs(self, past: Encoded) -> Inputs:
        return {
            **dict(zip(self.model.kv_names("past_key_values"), past.key_values, strict=True)),
            "past_lengths": past.lengths,
            "past_timestamps_ms": past.last_timestamps_ms,
        }
