"""The seam to engines that run graphs, ONNX Runtime and OpenVINO behind it, and the four graphs as methods.

backend.py       the seam to an inference engine
buffer.py        keys and values of a batch, with room to grow
engine.py        the graphs as methods over arrays and device tensors
grouping.py      what is computed together, and what padding costs
openvino_cpu.py  OpenVINO
ort_cpu.py       ONNX Runtime on the CPU, and what both of its backends share
ort_cuda.py      ONNX Runtime on a GPU, never silently on the CPU
"""
