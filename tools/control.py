"""Ask a run that is under way for something: python tools/control.py RUN set
learning_rate=3e-4; see --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lepton_jax.cli.control import main

if __name__ == "__main__":
    sys.exit(main())
