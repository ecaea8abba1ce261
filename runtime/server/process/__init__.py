"""A server as one process, or as several that serve together.

end.py         the end of a process, while a thread may still be at work
http.py        uvicorn with limits on request line and headers
lifecycle.py   the life of the process: listen, load, serve, drain
peers.py       requests handed to the process that caches their user
supervisor.py  several processes at one port, and the parent that restarts them
"""
