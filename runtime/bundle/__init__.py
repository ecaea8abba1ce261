"""The format on disk: what is declared, checked, and held in memory.

bundle.py     opening one
catalogue.py  items as requests name them: which rows filters leave
derived.py    the manifest of a bundle that is made from another
golden.py     golden requests
integrity.py  fingerprints, and a folder written whole or not at all
manifest.py   what a bundle declares, and whether tensors fit it
quality.py    how good lists are, as the manifest keeps it
sealed.py     its files in memory that nobody can write to
stored.py     vectors, sample users and golden requests, checked
"""
