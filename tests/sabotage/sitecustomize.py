"""Sabotage of vmrm's own processes, for tests: first on $PYTHONPATH, it comes with every start.

VMRM_SLOW_START=ROLE:SECONDS    the process of this role sleeps before anything else
"""

import os
import time
from pathlib import Path

words = Path("/proc/self/cmdline").read_bytes().split(b"\0")

role, _, seconds = os.environ.get("VMRM_SLOW_START", "").partition(":")
if role and role.encode() in words:
    time.sleep(float(seconds))
