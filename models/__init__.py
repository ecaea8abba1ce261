"""A model that retrieves and ranks, and its training. Imports nothing of ours beside `errors`.

attention.py   who sees whom: the two attention forms
baselines.py   scorers that need no model: popularity as of each request, what followed the last item
batches.py     windows, masks and negatives of a training step
checkpoint.py  a trained model as a folder
config.py      architecture and vocabulary of a model; the named sizes
embedders.py   item vectors; the token of an event or a candidate; time features
evaluate.py    held-out requests and their scores
layers.py      transformer block and rotary encoding
metrics.py     retrieval and ranking metrics
model.py       encode, extend, retrieve, rank, and the joint pass they must equal
"""
