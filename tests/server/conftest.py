"""What holds for every test of the server."""

from prenet4d_server.correction import errands

from .live import TIMEOUT_S

# A command waits for the pipeline of a machine that stands still, as everything else here does.
errands.TIMEOUT_S = TIMEOUT_S
