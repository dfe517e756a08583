"""The planted faults need a module that a sanitizer watches: ``.ci/sanitize`` builds and names it.

Elsewhere they are not collected.
"""

import os

collect_ignore = [] if os.environ.get("NLHF_SANITIZE") else ["test_planted.py"]
