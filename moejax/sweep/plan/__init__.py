"""Cells, buckets with one compiled program each, chunks of trials, and the user's code that they depend on."""

__all__ = ["chunks", "costs", "estimate", "identity", "plan", "plugins", "user_code"]
