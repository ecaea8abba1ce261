"""Simulated users, and the best possible scores on them.

oracle.py     the best possible scores on them
simulator.py  simulated users and what they were shown
world.py      their settings and catalogue
"""
