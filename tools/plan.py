"""Plan a recipe for hardware that need not be there: python tools/plan.py RECIPE.py
--on v5p:4x4x4; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lepton_jax.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
