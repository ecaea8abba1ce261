"""The Open Inference Protocol v2.

codec.py   its bodies, JSON and binary
graphs.py  the graphs as its models: metadata, checks, runs
routes.py  its routes
"""
