"""Write a checkpoint as a bundle, and prove that the bundle computes the same.

bundle_writer.py      the path from a model to a bundle, all or nothing
cases.py              inputs to compare with PyTorch
checkpoint_source.py  our own checkpoints as something to export
data_histories.py     histories of real users, for golden requests
golden.py             golden requests
graphs.py             inputs, outputs and tracing of the graphs
histories.py          histories of users, and whether they fit a model
inferred.py           what is read off a module and its catalogue
protocol.py           the five methods that a model needs to be exported
servable.py           our own model as something to export
warm_state.py         histories of prepared data for the events of a server
weights.py            one weight file for all graphs
"""
