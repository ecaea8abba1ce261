"""The one-stage objective, and the loop that minimises it.

config.py        settings of a run
cost.py          cost of a run before it starts: parameters, arithmetic, memory
log.py           log.csv and TensorBoard events
losses.py        the one-stage objective
sheet.py         what a data set can measure and teach, with warnings
softmax_loss.py  cross-entropy over many items, in chunks
state.py         state to resume a run from
train.py         the training loop
"""
