"""`python -m nodeagent`, and the `nodeagent` command."""

from __future__ import annotations

import sys

from nodeagent.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
