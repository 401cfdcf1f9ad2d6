"""The commands of `swarm`: each parses what was asked, calls the package, prints what came of it.

Heavy imports happen inside the commands: `--help`, `status` and errors stay quick.
"""
