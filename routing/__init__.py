"""Decisions about who serves what and which way a token goes.

Everything here is a pure function of frozen data, with the standard library only:
1. no clock, no socket, no logging, no randomness but a seed that the caller gives;
2. the order in which offers are given never changes an answer;
3. nothing of `blocks` or `swarm` is imported.
"""
