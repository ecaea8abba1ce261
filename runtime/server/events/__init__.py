"""The stores of users' events.

redis.py   in Redis or Valkey, for several replicas
seen.py    the items of dropped events
sqlite.py  in a file that survives kill -9
store.py   the interface, the rule by which events are merged, and the store in memory
"""
