"""Train a recipe: `python tools/launch.py RECIPE.py [--setting value ...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lepton_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
