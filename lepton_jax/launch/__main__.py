import sys

from lepton_jax.launch.cli import main

sys.exit(main())
