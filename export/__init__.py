"""From a trained checkpoint to a bundle: graphs, item table, index, golden requests, and the proof of parity."""
