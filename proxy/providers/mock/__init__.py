"""The mock provider: a deterministic, fault-injecting upstream. `handler` says how it is built.

`handler.Mock` is the upstream itself, `script.read_script` reads a script for it, `server.MockServer` puts it on
a socket, and `transport.scripted.ScriptedTransport` runs it in this process.
"""
