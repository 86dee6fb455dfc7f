"""Put requests to a run that is under way; see --help.

For example: `python tools/control.py RUN set learning_rate=3e-4`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lepton_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["control", *sys.argv[1:]]))
