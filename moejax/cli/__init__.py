"""The command line, `moejax fit | sweep | status | report | export | reproduce | activations | info`."""

from moejax.cli.program import main

__all__ = ["main"]
