"""The seam to engines that run graphs, ONNX Runtime and OpenVINO behind it, and the four graphs as methods.

backend.py       the seam to an inference engine, and its tensors
engine.py        the graphs as methods over arrays and device tensors
mock.py          graphs that are functions, for tests
openvino_cpu.py  OpenVINO
ort_cpu.py       ONNX Runtime on the CPU, and what both of its backends share
ort_cuda.py      ONNX Runtime on a GPU, never silently on the CPU
"""
