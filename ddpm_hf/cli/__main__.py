"""`python -m ddpm_hf.cli`."""

import sys

from . import main

sys.exit(main())
