"""The command line: `python -m lepton_jax launch | plan | control ...`."""

import sys

from lepton_jax.cli import main

sys.exit(main())
