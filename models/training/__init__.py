"""The one-stage objective, and the loop that minimises it.

config.py        its settings
cost.py          what a run would cost: parameters, arithmetic, memory
log.py           what a run leaves to look at
losses.py        the one-stage objective
sheet.py         what a data set can show and teach, with warnings
softmax_loss.py  cross-entropy over many items, in chunks
state.py         what resuming needs
train.py         the training loop
"""
