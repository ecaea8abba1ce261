"""Make a graph fit for a bundle: weights shared by all graphs of a precision, no traces of the exporting machine."""

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
        """Rewrite a graph so that its large weights live in the shared file and its nodes carry no source paths.

        Beyond 1.5 GiB torch puts them into a file of its own, whatever it is told; that is removed.
        """
        self.put(onnx.load(self.folder / graph_file), graph_file)
        (self.folder / f"{graph_file}.data").unlink(missing_ok=True)

    def put(self, model: onnx.ModelProto, graph_file: str) -> None:
        """Write a graph that has its weights inside, likewise; it is modified."""
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data") and len(tensor.raw_data) >= MIN_SHARED_BYTES:
                self._share(tensor)
        _strip(model)
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


def _strip(model: onnx.ModelProto) -> None:
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.graph.ClearField("doc_string")
    model.graph.ClearField("metadata_props")
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
