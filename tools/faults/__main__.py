"""Break runs on several hosts: python -m tools.faults [options]."""

import sys

from tools.faults.campaign import main

if __name__ == "__main__":
    sys.exit(main())
