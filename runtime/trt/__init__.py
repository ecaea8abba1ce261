"""TensorRT and CUDA: building, storing and running engines.

backend.py        engines as a backend
build.py          builds one engine from one graph
cuda.py           NVIDIA's bindings, wrapped once
layers.py         the precision of an engine's layers
library.py        the installed TensorRT, and its one logger
load.py           loads a plan: its inputs, outputs and shapes, and a runner for each profile
memory.py         tensors in a GPU's memory, and their lifetime
network.py        the parsed network: completed, and checked against its graph
private_files.py  files that only this user can write
profiles.py       the shapes that engines are built for
record.py         the record of an engine, and whether it may run here
runner.py         one profile of an engine, for one run at a time
serving.py        the compiled engines of a bundle that may run here
store.py          the private cache of engines
"""
