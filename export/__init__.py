"""Checkpoint to bundle, with proof that it computes the same.

bundle_writer.py      the path from a model to a bundle, all or nothing
cases.py              inputs to compare with PyTorch on
checkpoint_source.py  our own checkpoints under that contract
data_histories.py     histories of real users, for golden requests
golden.py             golden requests
graphs.py             inputs, outputs and tracing of the graphs
parity.py             the comparison
protocol.py           what export asks of a model: five methods
weights.py            one weight file for all graphs
"""
