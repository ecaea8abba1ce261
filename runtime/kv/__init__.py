"""The cache of users' keys and values across requests.

cache.py    entries, leases and eviction; whether an entry fits a request
encoder.py  encodes requests in groups, through the cache
options.py  options and statistics of the cache
pages.py    memory for keys and values, in four precisions
"""
