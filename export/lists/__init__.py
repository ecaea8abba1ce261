"""How the lists of a bundle are ordered, and how good they are; the lists of all users of a data set.

all_users.py          the list of each user of prepared data, as one file
blend.py              the share of retrieval in the order by value
evaluation.py         quality of the lists of a bundle on held-out requests
held_out.py           how well the last events of users are predicted
held_out_requests.py  sends held-out requests to a bundle, as a client would
popularity.py         popularity of each item, for users without events
prepared.py           histories of prepared data, as clients would send them
served_order.py       chooses the order of slates of a model, with the reason
"""
