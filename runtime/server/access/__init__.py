"""Who may send requests, and how many.

access.py       the decision about a request; the TLS context
files.py        files that are read again when they change
rate_limit.py   how many requests a client may send
tokens.py       bearer tokens and their scopes
"""
