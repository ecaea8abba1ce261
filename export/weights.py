"""Prepare graphs for a bundle: all graphs of a precision share one weight file, and carry no exporter metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx import external_data_helper

WEIGHTS_FILE = "weights.bin"
MIN_SHARED_BYTES = 1024
ALIGNMENT = 4096


class SharedWeights:
    """Appends each distinct tensor once to one file of a folder; graphs refer to it by offset."""

    def __init__(self, folder: Path, file: str = WEIGHTS_FILE) -> None:
        self.folder, self.file = folder, file
        self.offsets: dict[str, int] = {}
        (folder / file).touch()

    def take(self, graph_file: str) -> None:
        """Rewrite a graph file so that its large weights lie in the shared file, without source paths in its nodes.

        Beyond 1.5 GiB torch writes a weight file of its own, whatever its options say; this method deletes it.
        """
        self.put(onnx.load(self.folder / graph_file), graph_file)
        (self.folder / f"{graph_file}.data").unlink(missing_ok=True)

    def put(self, model: onnx.ModelProto, graph_file: str) -> None:
        """Write a graph that holds its weights in the same way. Modifies `model`."""
        graph = model.graph
        for tensor in graph.initializer:
            if tensor.HasField("raw_data") and len(tensor.raw_data) >= MIN_SHARED_BYTES:
                self._share(tensor)
        values = [*graph.input, *graph.output, *graph.value_info]
        for part in (model, graph, *graph.node, *values, *graph.initializer):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
        (self.folder / graph_file).write_bytes(model.SerializeToString(deterministic=True))

    def _share(self, tensor: onnx.TensorProto) -> None:
        content = tensor.raw_data
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self.offsets:
            with (self.folder / self.file).open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self.offsets[digest] = file.tell()
                file.write(content)
        external_data_helper.set_external_data(tensor, self.file, offset=self.offsets[digest], length=len(content))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
