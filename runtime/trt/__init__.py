"""TensorRT and CUDA: building, keeping and running engines.

backend.py        engines as a backend
build.py          one graph into one engine
cuda.py           NVIDIA's bindings, wrapped once
io.py             what an engine takes and gives, and which shapes
layers.py         what an engine computes in, layer by layer
library.py        which TensorRT is installed, and its one logger
load.py           from a plan to an engine that can run
memory.py         tensors in a GPU's memory, and how long they live
private_files.py  files that are this user's alone
profiles.py       the shapes that engines are built for
record.py         what is known of an engine, and whether it may run here
runner.py         one profile of an engine, for one run at a time
serving.py        the compiled engines that may serve a bundle here
store.py          the private cache of engines
"""
