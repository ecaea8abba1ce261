"""What a server says of itself: logs, metrics, traces, served lists.

log.py               structured logs
metrics.py           Prometheus metrics
metrics_together.py  those of several processes as one scrape
served_log.py        what was recommended, as Parquet files
trace.py             where the time of one request went
"""
