"""All that depends on a release of transformers.

1. What a release calls something is asked by feature (a signature, an attribute), never by number.
2. What is not as known raises by name. Nothing is left out silently.
"""
