"""Besiege a server: python -m tools.siege COMMAND ARTIFACT [options]."""

import sys

from tools.siege.cli import main

if __name__ == "__main__":
    sys.exit(main())
