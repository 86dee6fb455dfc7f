"""Plan a recipe for hardware that need not be there; see --help.

For example: `python tools/plan.py RECIPE.py --on v5p:4x4x4`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lepton_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
