"""``python -m trinityx_jax``."""

import sys

from trinityx_jax.cli import main

sys.exit(main())
