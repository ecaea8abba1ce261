"""The model, its data and its training. Imports torch; nothing here knows of graphs, bundles or engines."""
