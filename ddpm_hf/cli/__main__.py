"""`python -m ddpm_hf.cli`."""

from . import main

raise SystemExit(main())
