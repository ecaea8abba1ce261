"""What orders the lists of a bundle, and how good they are.

blend.py              how much of retrieval the order by value takes
evaluation.py         the lists that a bundle serves, measured on held-out requests
held_out.py           how well users' last events are predicted
held_out_requests.py  those requests, put as a client would put them
popularity.py         how popular each item is, for users without events
served_order.py       what slates of a model are ordered by, and why
"""
