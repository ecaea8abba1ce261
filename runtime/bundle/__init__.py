"""The bundle format: read, checked, and held in memory.

bundle.py     open a bundle
catalogue.py  item ids, retired items, and filters by id, word and number
derived.py    the manifest of a bundle made from another
golden.py     golden requests
hub.py        bundles of the Hugging Face Hub
integrity.py  fingerprints, and writing a folder completely or not at all
manifest.py   types of `manifest.json`, and checks of tensors against it
metadata.py   what a shop knows of its items beside the model, such as prices
quality.py    quality of lists, as the manifest stores it
sealed.py     files in sealed memory, which no process can change
stored.py     checks of stored vectors, sample users and golden requests
"""
