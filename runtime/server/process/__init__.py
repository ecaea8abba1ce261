"""A server as one process, or as several that serve together.

end.py         its end, while a thread may still be at work
http.py        uvicorn with bounds on what comes before a body
lifecycle.py   the life of the process: listen, load, serve, drain
peers.py       requests handed to the process that has their user cached
supervisor.py  several of them at one port, and the parent that starts them again
"""
