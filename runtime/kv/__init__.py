"""Keys and values of users, from request to request.

cache.py      who is cached, in use, and next to make room; what serves which request
histories.py  from requests to encoded histories, through the cache and in groups
options.py    how much is cached, and what the cache has done
pages.py      memory of cached keys and values, in four precisions
"""
