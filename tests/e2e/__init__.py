"""The whole program, used as its users use it: real processes, real sockets, real SDKs."""
