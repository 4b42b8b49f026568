"""The compiled bitshuffle and LZ4 routines inside hdf5plugin's bitshuffle filter.

Called through ctypes: a wheel that needs no compiler, writes into the caller's memory and lets go
of the GIL meanwhile, so that decoding scales with threads (the `bitshuffle` and `imagecodecs`
packages each lack one of the three).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import hdf5plugin


def _load() -> ctypes.CDLL:
    """The compiled filter, with the signatures of the routines that are used here.

    Raises:
        ImportError: this build of hdf5plugin does not have them.
    """
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    signatures = {
        "LZ4_decompress_safe": (ctypes.c_int, [ctypes.c_char_p, pointer, *[ctypes.c_int] * 2]),
        "LZ4_compress_default": (ctypes.c_int, [pointer, pointer, *[ctypes.c_int] * 2]),
        "LZ4_compressBound": (ctypes.c_int, [ctypes.c_int]),
        "bshuf_decompress_lz4": (ctypes.c_int64, [ctypes.c_char_p, pointer, size, size, size]),
        "bshuf_compress_lz4": (ctypes.c_int64, [pointer, pointer, size, size, size]),
        "bshuf_compress_lz4_bound": (size, [size, size, size]),
        "bshuf_bitunshuffle": (ctypes.c_int64, [pointer, pointer, size, size, size]),
    }
    build = hdf5plugin.get_config().build_config
    path = Path(hdf5plugin.PLUGIN_PATH) / f"libh5bshuf{build.filter_file_extension}"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"The installed hdf5plugin has no usable bitshuffle filter ({error}). "
            "Install its wheel from the package index: pip install --force-reinstall hdf5plugin"
        ) from error
    return library


LIBRARY = _load()
