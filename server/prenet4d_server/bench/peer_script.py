"""Run by the interpreter that has LiberTEM-live: its center of mass on a simulated detector.

usage: peer_script.py REST_PORT STREAM_PORT NY NX SIZE RUNS RESULT.json

Nothing of prenet4d can be imported here. Writes the frames per second of each run; a run goes from
arming the detector to the finished result, as LiberTEM-live's users see it.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Connect to the simulator and run the analysis so many times."""
    rest, stream, ny, nx, size, runs = (int(text) for text in sys.argv[1:7])
    from libertem.udf.com import CoMUDF  # type: ignore[import-not-found]
    from libertem_live.api import LiveContext  # type: ignore[import-not-found]

    rates = []
    analysis = CoMUDF.with_params(cy=size / 2, cx=size / 2, r=0.4 * size)
    with (
        LiveContext() as context,
        context.make_connection("dectris").open(
            api_host="127.0.0.1",
            api_port=rest,
            data_host="127.0.0.1",
            data_port=stream,
            buffer_size=2048,
        ) as connection,
    ):
        for _ in range(runs):
            acquisition = context.make_acquisition(
                conn=connection,
                nav_shape=(ny, nx),
                frames_per_partition=512,
                controller=connection.get_active_controller(trigger_mode="exte"),
            )
            began = time.perf_counter()
            context.run_udf(dataset=acquisition, udf=analysis)
            rates.append(ny * nx / (time.perf_counter() - began))
    Path(sys.argv[7]).write_text(json.dumps(rates))


# LiberTEM starts workers that import this file again.
if __name__ == "__main__":
    main()
