"""Logs, metrics, traces, and the log of recommendations.

log.py               structured logs
metrics.py           Prometheus metrics
metrics_together.py  metrics of several processes in one scrape
served_log.py        recommendations as Parquet files
trace.py             the time of one request
"""
