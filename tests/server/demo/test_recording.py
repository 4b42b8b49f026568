"""The demo reads what the recorder writes by default, in a process that has read nothing else."""

import subprocess
import sys


def test_compressed_recordings_can_be_read():
    code = "import prenet4d_server.demo.recording, sys; sys.exit('hdf5plugin' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
