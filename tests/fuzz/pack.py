#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One file from a folder of inputs, and back: pack.py FOLDER FILE, pack.py --unpack FILE FOLDER."""
import pathlib
import struct
import sys

if sys.argv[1] == "--unpack":
    data, folder = pathlib.Path(sys.argv[2]).read_bytes(), pathlib.Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    at = k = 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        (folder / f"{k:05d}").write_bytes(data[at + 4:at + 4 + size])
        at, k = at + 4 + size, k + 1
else:
    inputs = sorted((p.read_bytes() for p in pathlib.Path(sys.argv[1]).iterdir()), key=lambda b: (len(b), b))
    pathlib.Path(sys.argv[2]).write_bytes(b"".join(struct.pack("<I", len(b)) + b for b in inputs))
