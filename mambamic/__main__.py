"""``python -m mambamic`` is the same as ``mambamic``."""

import sys

from mambamic.cli import main

sys.exit(main())
