"""Whether a bundle computes what the module and its library compute.

contract.py   the rules that a module must keep, checked before it is traced
parity.py     the graphs compared with PyTorch
probe.py      a module as the contract calls it, and differences in words
reference.py  served answers compared with the scores of the library that a model comes from
"""
