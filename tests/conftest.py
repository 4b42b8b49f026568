"""What holds for every test."""

import os

# Tests share the cores with each other's processes: threads that share one operation, and spin
# while they wait for each other, would slow everything down. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
