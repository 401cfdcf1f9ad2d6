"""Compute: the blocks of any Hugging Face causal language model, torch in and torch out.

Knows no network: the seam to the rest is Python's `range` and the messages of `blocks.executor`.
Importing this package, or `blocks.errors`, imports nothing heavy.
"""
