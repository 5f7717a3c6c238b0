"""Image files as strangers make them: encoded pictures, and hand-made PNG."""

import io
import struct
import zlib

from PIL import Image

ADLER = 65521


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG of any header and any compressed data (color 0 is grey, 2 is RGB)."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + data, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def bomb(side: int) -> bytes:
    """A valid PNG of side x side black RGB pixels, a thousandth as large as they are."""
    rest = side * (3 * side + 1)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = 1 << 20
    block = packer.compress(bytes(piece)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(bytes(rest % piece)) + packer.flush()
    checksum = struct.pack(">HH", rest % ADLER, 1)  # Adler-32 of zeros
    return png(side, side, 8, 2, b"\x78\xda" + block * (rest // piece) + end + checksum)
