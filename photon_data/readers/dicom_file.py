"""A DICOM file of which pydicom can read so many bytes and no more, whatever its lengths say, packed or not."""

from __future__ import annotations

import os
import zlib
from typing import BinaryIO

# An enhanced object with the places of thousands of frames takes a few MB.
MAX_HEADER_BYTES = 1 << 25
CHUNK = 1 << 16
# What a read counts for at least: a hole in a file is as many empty elements as fit in.
LEAST = 64


class TooLong(ValueError):
    """A header, or what comes of a deflated file, is longer than any of an image."""


class DicomFile:
    """An open file as pydicom wants it; TooLong once more than `most` bytes are read of it.

    pydicom reads what elements say of their lengths, in a file that may be nearly all holes, and inflates a deflated
    data set whole, of which a few MB can hold GBs.
    """

    def __init__(self, file: BinaryIO, most: int = MAX_HEADER_BYTES) -> None:
        self.file, self.name, self.most, self.left = file, file.name, most, most
        self.size = os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes. All the rest is asked for where it is deflated."""
        if size < 0:
            return self._start_of_deflated()
        count = max(0, min(size, self.size - self.file.tell()))
        self.left -= max(count, LEAST)
        if self.left < 0:
            raise TooLong(f"expected at most {self.most:,} bytes, found more")
        return self.file.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the file."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file."""
        return self.file.tell()

    def _start_of_deflated(self) -> bytes:
        """Return what fits of a deflated data set, deflated again without effort; leave the file at its end."""
        inflate, pieces, left = zlib.decompressobj(-zlib.MAX_WBITS), [], self.most
        while left > 0 and not inflate.eof and (chunk := self.file.read(CHUNK)):
            pieces.append(inflate.decompress(chunk, left))
            left -= max(len(pieces[-1]), len(chunk))
        self.file.seek(0, os.SEEK_END)
        deflate = zlib.compressobj(0, zlib.DEFLATED, -zlib.MAX_WBITS)
        return deflate.compress(b"".join(pieces)) + deflate.flush()
