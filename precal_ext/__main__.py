"""``python -m precal_ext`` is ``precal``."""

import sys

from precal_ext.cli import main

sys.exit(main())
