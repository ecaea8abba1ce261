"""The Open Inference Protocol v2.

codec.py   its bodies, JSON and binary
graphs.py  the graphs under it, and what they may be given
routes.py  the Open Inference Protocol v2
"""
