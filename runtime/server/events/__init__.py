"""Users' events, where a server keeps them.

redis.py   in Redis or Valkey, for several replicas
sqlite.py  in a file that survives kill -9
store.py   users' events: the rule by which they are merged, and memory
"""
