"""Writes the golden bytes of message types that have none yet; never touches those that have.

Run from the project's root: ``python -m tests.client.golden.make``
"""

import json
from pathlib import Path

import msgpack

from prenet4d_client.messages import VERSION, Header
from prenet4d_client.wire import Array, encode

from ..examples import EXAMPLES

FOLDER = Path(__file__).parent / f"v{VERSION}"


def main() -> None:
    for name, (header, arrays) in EXAMPLES.items():
        write(FOLDER / f"{name}.bin", packed(header, arrays))
        meaning = {
            "header": header.model_dump(mode="json", exclude={"arrays"}),
            "arrays": {
                key: {"dtype": array.dtype.name, "values": array.tolist()}
                for key, array in arrays.items()
            },
        }
        text = json.dumps(meaning, indent=1, ensure_ascii=False) + "\n"
        write(FOLDER / f"{name}.json", text.encode())
    write(FOLDER / "frames-lz4.bin", packed(*EXAMPLES["frames"], lz4=True))


def packed(header: Header, arrays: dict[str, Array], *, lz4: bool = False) -> bytes:
    parts: bytes = msgpack.packb([bytes(part) for part in encode(header, arrays, lz4=lz4)])
    return parts


def write(target: Path, content: bytes) -> None:
    if not target.exists():
        target.write_bytes(content)
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
