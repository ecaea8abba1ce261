"""Simulated users, and the best possible scores on them.

oracle.py     the best possible scores
simulator.py  simulated users and their slates
world.py      settings and catalogue
"""
