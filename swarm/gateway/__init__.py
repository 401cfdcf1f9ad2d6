"""The API that everybody's programs already speak, in front of a swarm: docs/api.md.

Importing this imports nothing heavy; `swarm.gateway.serving` brings the HTTP server.
"""
