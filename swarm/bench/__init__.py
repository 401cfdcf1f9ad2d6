"""How fast a swarm is: this machine's blocks, a route, many users. What `swarm bench` runs."""
