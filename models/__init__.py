"""A model that retrieves and ranks, and its training. Imports nothing of ours beside `errors`.

attention.py   the two attention forms: which slots a query sees
baselines.py   scorers without a model: popularity at the time of each request, next item after the last one
batches.py     windows, masks and negatives of a training step
checkpoint.py  a trained model as a folder
config.py      architecture and vocabulary of a model; the named sizes
embedders.py   item vectors; the token of an event or a candidate; time features
evaluate.py    held-out requests and their scores
layers.py      transformer block and rotary encoding
metrics.py     retrieval and ranking metrics
model.py       encode, extend, retrieve, rank, and the joint pass of training
"""
