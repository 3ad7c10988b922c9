"""What the proxy costs, measured: `python -m tests.bench` (or `make bench`).

Three kinds of process, each of its own: the upstream (`upstream.py`), the servers under test (`apps.py` and the proxy
itself) and the load (`load.py`). The servers have one core to themselves, upstream and load share the rest; only one
server is under load at a time. What is compared is always compared within one run, in interleaved rounds: a figure in
microseconds is true of one machine on one day, a ratio travels.
"""
