"""`python -m ccl_timm COMMAND ...` is `ccl-timm COMMAND ...`."""

import sys

from ccl_timm.cli import main

sys.exit(main())
