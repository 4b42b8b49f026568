"""From a detector into the ring: a process of its own, and the main process's end of it."""
