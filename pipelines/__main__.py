"""`python -m pipelines` is the `danlu` command; the entry point of submitted Ray jobs."""

import sys

from pipelines.cli import main

sys.exit(main())
