"""The graphs of a bundle as methods, the interface to inference engines, and its implementations.

backend.py       the interface to an inference engine, and its tensors
engine.py        the graphs as methods over arrays and device tensors, and how much memory a run takes at most
mock.py          a backend for tests, with functions as graphs
openvino_cpu.py  OpenVINO
ort_cpu.py       ONNX Runtime on the CPU, and code that both of its backends share
ort_cuda.py      ONNX Runtime on a GPU, never silently on the CPU
"""
