"""The four graphs as four methods over arrays and device tensors.

This module pads histories and names tensors; it knows no external ids, indexes or requests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from unipinrec.errors import BackendError, RequestError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.bundle.manifest import ModelSpec, Tensor
from unipinrec.runtime.graphs.backend import CPU, MAX_ROWS, Backend, Device
from unipinrec.runtime.graphs.ort_cpu import OrtBackend
from unipinrec.runtime.requests import History

THREAD_WORK = 4_000_000  # candidates x layers x hidden size squared: about a millisecond, the least worth a thread
WORK_BYTES = 512 << 20
TOKEN_WIDTHS = 32  # of numbers that live at once per token; 18 to 22 were measured
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

    def __len__(self) -> int:
        """n."""
        return int(self.item_rows.shape[1])

    def part(self, start: int, stop: int) -> HistoryBatch:
        """Events `start` up to `stop` of histories of equal length."""
        columns = {name: values[:, start:stop] for name, values in vars(self).items() if name != "lengths"}
        return HistoryBatch(**columns, lengths=np.minimum(self.lengths, stop) - start)

    def last_timestamps_ms(self) -> NDArray[np.int64]:
        """Time of each row's last event, [B]."""
        last: NDArray[np.int64] = self.timestamps_ms[np.arange(len(self.lengths)), self.lengths - 1]
        return last


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An encoded batch on the device, ready for retrieval, ranking and extension.

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

    def over(self, buffer: KvBuffer) -> Encoded:
        """The same histories with their keys and values in a buffer."""
        return replace(self, key_values=buffer.tensors())


def pad_histories(histories: Sequence[History]) -> HistoryBatch:
    """Right-pad histories into one batch."""
    columns = {name: pad_rows([getattr(history, name) for history in histories]) for name in vars(histories[0])}
    return HistoryBatch(**columns, lengths=np.array(list(map(len, histories)), np.int64))


def pad_rows(rows: Sequence[NDArray[Scalar]]) -> NDArray[Scalar]:
    """Right-pad arrays [n_i, ...] with zeros into [B, max n_i, ...]."""
    padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for slot, row in zip(padded, rows, strict=True):
        slot[: len(row)] = row
    return padded


class Engine:
    """Runs a model's graphs on a backend over one item table; safe to call from several threads.

    Attributes:
        device: Device of the backend, and why it was chosen.
        prefill_chunk: Most events of one history to encode in one run; None = all.
        work_bytes: Most memory that a batch may take, by `work_bytes`; None = no limit.
    """

    def __init__(
        self,
        backend: Backend,
        model: ModelSpec,
        item_vectors: NDArray[np.float32],
        device: Device = CPU,
        work_bytes: int | None = None,
    ) -> None:
        self.backend, self.model, self.item_vectors, self.device = backend, model, item_vectors, device
        self.work_bytes = work_bytes
        self._threads = ThreadPoolExecutor(max(1, backend.rank_runs - 1), "unipinrec-rank")
        self._lock, self._batches = threading.Lock(), 0
        self._process, self._closed = os.getpid(), False
        self.prefill_chunk = backend.prefill_chunk if model.cache == "prefix" else None

    @classmethod
    def on_cpu(cls, bundle: Bundle) -> Engine:
        """Load a bundle's fp32 graphs in ONNX Runtime on the CPU.

        Raises:
            BackendError: ONNX Runtime is missing, or does not load a graph.
        """
        return cls(OrtBackend(bundle.graph_files()), bundle.manifest.model, bundle.item_vectors)

    def close(self) -> None:
        """Release the graphs and their memory; running and later requests fail."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.backend.close()

    def require_process(self) -> None:
        """Check that this process opened the graphs: a fork has no threads to run them.

        Raises:
            BackendError: This process is a fork.
        """
        if os.getpid() != self._process:
            raise BackendError(
                f"the bundle was loaded by process {self._process}; this one, {os.getpid()}, is a fork without its "
                "threads; load the bundle after the fork, in each process"
            )

    def require_room(self, events: int) -> None:
        """Check that encoding a history fits into `work_bytes`; ranking is cut into smaller runs instead.

        Raises:
            RequestError: It does not.
        """
        needed = self._encoding_bytes(events, events + self.model.kv_prefix_slots)
        if self.work_bytes is not None and needed > self.work_bytes:
            raise RequestError(
                f"a history of {events} events takes up to {needed >> 10:,} KiB to encode, and a batch may take "
                f"{self.work_bytes >> 10:,} KiB; send fewer events, or serve with more (--work-mib)"
            )

    def most_rows(self, events: int, slots: int) -> int:
        """Number of histories that may be encoded together, at least 1: `events` of the `slots` slots are new."""
        return MAX_ROWS if self.work_bytes is None else max(1, self.work_bytes // self._encoding_bytes(events, slots))

    def _encoding_bytes(self, events: int, slots: int) -> int:
        return work_bytes(self.model, 1, min(events, self.prefill_chunk or events), slots)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Hold while a batch is computed; concurrent batches share the threads of ranking."""
        with self._lock:
            self._batches += 1
        try:
            yield
        finally:
            with self._lock:
                self._batches -= 1

    def encode(self, batch: HistoryBatch) -> Encoded:
        """Encode histories from their first event."""
        outputs = self.backend.run("encoder", self._event_inputs(batch))
        return Encoded(
            key_values=tuple(outputs[name] for name in self.model.kv_names("present")),
            lengths=batch.lengths,
            last_timestamps_ms=batch.last_timestamps_ms(),
            last_hidden_state=outputs["last_hidden_state"],
        )

    def prefill(self, batch: HistoryBatch) -> Encoded:
        """Encode histories like `encode`; a single long one in chunks, each of which attends to the chunks before it.

        A graph's causal attention computes all n x n scores and hides half of them; chunks avoid most of the hidden
        half.
        """
        events, chunk, prefix = len(batch), self.prefill_chunk, self.model.kv_prefix_slots
        if chunk is None or events <= chunk or len(batch.lengths) > 1:
            return self.encode(batch)
        size = -(-events // -(-events // chunk))  # chunks of nearly equal size
        done = self.encode(batch.part(0, size))
        buffer = KvBuffer(self.model, 1, events + prefix)
        buffer.put(0, 0, row_of(on_host(done.key_values), 0, size + prefix))
        for start in range(size, events, size):
            past = replace(done, key_values=buffer.beginning(start + prefix))
            done = self.extend_in_place(buffer, past, batch.part(start, start + size))
        return done

    def extend(self, past: Encoded, batch: HistoryBatch) -> Encoded:
        """Encode the events that follow an encoded past; the result equals encoding both at once."""
        prefix = self.model.kv_prefix_slots
        buffer = KvBuffer(self.model, len(past.lengths), int((past.lengths + batch.lengths).max()) + prefix)
        key_values = on_host(past.key_values)
        for row, slots in enumerate(past.lengths + prefix):
            buffer.put(row, 0, row_of(key_values, row, slots))
            buffer.clear_from(row, slots)
        return self.extend_in_place(buffer, past.over(buffer), batch)

    def extend_in_place(self, buffer: KvBuffer, past: Encoded, batch: HistoryBatch) -> Encoded:
        """Encode the events that follow a past, and put their keys and values behind it.

        Args:
            buffer: Holds the past's keys and values; its other slots are zero, and suffice for the new events.
            past: The past, whose keys and values are views or copies of the buffer's.
            batch: The new events.
        """
        new, last_hidden_state = self.encode_new(past, batch)
        added = on_host(new)
        for row, (length, count) in enumerate(zip(past.lengths, batch.lengths, strict=True)):
            buffer.put(row, length + self.model.kv_prefix_slots, row_of(added, row, count))
        return Encoded(
            key_values=buffer.tensors(),
            lengths=past.lengths + batch.lengths,
            last_timestamps_ms=batch.last_timestamps_ms(),
            last_hidden_state=last_hidden_state,
        )

    def encode_new(self, past: Encoded, batch: HistoryBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run the extend graph: the new events' keys/values [B, H_kv, m, D], and the last hidden state [B, d]."""
        outputs = self.backend.run("extend", {**self._event_inputs(batch), **self._past_inputs(past)})
        return tuple(outputs[name] for name in self.model.kv_names("present")), outputs["last_hidden_state"]

    def retrieve(self, encoded: Encoded, outcomes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Query vectors [B, Q, E]; only models that are conditioned on outcomes read `outcomes` [B, C]."""
        inputs: Inputs = {"last_hidden_state": encoded.last_hidden_state}
        if self.model.outcome_conditioned:
            inputs["outcomes"] = outcomes
        return self.backend.run("retrieval", inputs)["queries"].numpy()

    def rank(
        self, encoded: Encoded, candidates: NDArray[np.int64], surfaces: NDArray[np.int64], now_ms: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Action logits [B, k, C] of candidate rows [B, k], shown at `surfaces` [B] and `now_ms` [B].

        Raises:
            BackendError: The run failed or gave values that are not finite.
        """
        inputs: Inputs = {**self._past_inputs(encoded), "surfaces": surfaces, "timestamps_ms": now_ms}
        if self.model.ranker == "past+last_hidden_state":
            inputs["last_hidden_state"] = encoded.last_hidden_state
        work = candidates.size * self.model.num_layers * self.model.hidden_size**2
        parts = max(1, min(self.backend.rank_runs // max(1, self._batches), candidates.shape[1], work // THREAD_WORK))
        chunk = self._rank_chunk(encoded, candidates, parts)
        first, *others = np.array_split(candidates, parts, axis=1)
        try:
            running = [self._threads.submit(self._logits, inputs, part, chunk) for part in others]
            logits = np.concatenate([self._logits(inputs, first, chunk), *(run.result() for run in running)], axis=1)
        except (RuntimeError, CancelledError) as error:
            if not self._closed:
                raise
            raise BackendError("the graphs were closed while they ran; load the bundle again") from error
        if not np.isfinite(logits).all():
            raise BackendError("ranker: the logits are not finite; the graph is broken, export the bundle again")
        return logits

    def _rank_chunk(self, encoded: Encoded, candidates: NDArray[np.int64], parts: int) -> int:
        """Most candidates of one run, when `parts` runs are computed at the same time."""
        (rows, count), slots = candidates.shape, int(encoded.lengths.max()) + self.model.kv_prefix_slots
        chunk = self.backend.rank_chunk or count
        if self.work_bytes is None:
            return chunk
        fixed = work_bytes(self.model, rows, 0, slots)
        each = work_bytes(self.model, rows, 1, slots) - fixed
        return max(1, min(chunk, (self.work_bytes // parts - fixed) // each))

    def _logits(self, inputs: Inputs, candidates: NDArray[np.int64], chunk: int) -> NDArray[np.float32]:
        """Logits of candidates [B, k], in runs of one chunk at most; `inputs` holds the ranker's other inputs."""
        runs = []
        for part in np.array_split(candidates, -(-candidates.shape[1] // chunk), axis=1):
            vectors = self.item_vectors[part]
            runs.append(self.backend.run("ranker", {**inputs, "candidate_vectors": vectors})["logits"].numpy())
        return np.concatenate(runs, axis=1)

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


class KvBuffer:
    """Keys and values of `batch` histories of at most `slots` slots each; clear the slots that are not put.

    Attributes:
        values: [2 * layers, batch, H_kv, slots, D] f32, in layer order, the key before the value.
    """

    def __init__(self, model: ModelSpec, batch: int, slots: int) -> None:
        shape = (2 * model.num_layers, batch, model.num_kv_heads, slots, model.head_dim)
        self.values = np.empty(shape, np.float32)

    def tensors(self) -> tuple[HostTensor, ...]:
        """Each tensor [batch, H_kv, slots, D], a view."""
        return tuple(HostTensor(values) for values in self.values)

    def beginning(self, slots: int) -> tuple[HostTensor, ...]:
        """A copy of each tensor's first slots."""
        return tuple(HostTensor(np.ascontiguousarray(values[:, :, :slots])) for values in self.values)

    def row(self, row: int) -> NDArray[np.float32]:
        """A writable view of one history, [2 * layers, H_kv, slots, D]."""
        view: NDArray[np.float32] = self.values[:, row]
        return view

    def put(self, row: int, first: int, key_values: Sequence[NDArray[np.float32]]) -> None:
        """Put each tensor's slots [H_kv, m, D] into slots `first` up to `first + m` of a row."""
        for values, new in zip(self.values, key_values, strict=True):
            values[row, :, first : first + new.shape[1]] = new

    def clear_from(self, row: int, slots: int) -> None:
        """Zero all slots from `slots` on: attention masks them, but a NaN there would still spread."""
        self.values[:, row, :, slots:] = 0.0


@dataclass(frozen=True, eq=False)
class HostTensor:
    """A numpy array as a `Tensor`."""

    values: NDArray[Any]

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return self.values.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Tensor.shape`."""
        return self.values.shape

    def numpy(self) -> NDArray[Any]:
        """See `Tensor.numpy`."""
        return self.values


def on_host(key_values: Sequence[Tensor]) -> tuple[HostTensor, ...]:
    """Per-layer tensors on the host; each is copied there once at most, however many rows are read."""
    return tuple(HostTensor(tensor.numpy()) for tensor in key_values)


def row_of(key_values: Sequence[Tensor], row: int, slots: int) -> list[NDArray[np.float32]]:
    """The first slots of one row of per-layer tensors [B, H_kv, >= slots, D]: views [H_kv, slots, D]."""
    return [tensor.numpy()[row, :, :slots] for tensor in key_values]


def work_bytes(model: ModelSpec, rows: int, tokens: int, slots: int) -> int:
    """Most bytes that a run of a graph takes beside weights and inputs, known from their shapes before it runs.

    It holds for transformers whose feed-forward layers are at most four times as wide as their tokens.
    `bench/memory.py` compares it with the measured peak.

    Args:
        model: The model.
        rows: Histories, B.
        tokens: New events or candidates of each.
        slots: Slots that each of them attends to, new ones included.
    """
    heads = max(model.num_kv_heads, model.hidden_size // max(1, model.head_dim))
    token = TOKEN_WIDTHS * max(model.hidden_size, model.item_dim) + 2 * heads * slots  # scores before and after softmax
    slot = 4 * model.num_layers * model.num_kv_heads * model.head_dim  # keys and values, and a copy of them
    return 4 * rows * (tokens * token + slots * slot)
