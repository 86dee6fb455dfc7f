"""Measure Lepton: python -m tools.bench COMMAND [options]."""

import sys

from tools.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
