"""The pixels of an image file as RGB of 8 bits: converted faithfully, or refused by name."""

from __future__ import annotations

from PIL import Image, ImageOps

# Modes of PIL whose colours 8 bits of red, green and blue hold: grey, black and white, a palette, inks of a printer.
MODES = ("RGB", "RGBA", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr")
OPAQUE = 255
ORIENTATION = 0x0112


class UnsuitedImage(ValueError):
    """An image that can be read, and not faithfully be made RGB of 8 bits; its text names it."""


def rgb(image: Image.Image, name: object, as_stored: bool = False) -> Image.Image:
    """The pixels of an opened image in RGB, upright as its EXIF data say.

    CMYK is converted as PIL does it, without colour profiles. Alpha is dropped where all of the image is opaque.

    Args:
        name: of the file, for error messages.
        as_stored: take the colours that are stored, neither turned by EXIF data nor on any background, as the loaders
            of some papers do.

    Raises:
        UnsuitedImage: it has 16 bits or floats a channel, is in part transparent, has several frames, or is in colours
            that PIL does not convert.
        OSError: it is truncated or damaged.
    """
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise UnsuitedImage(f"{name} is animated, {image.n_frames} frames: give a file for each image")
    if image.mode.startswith(("I", "F")) or _has_16_bits(image):
        raise UnsuitedImage(f"{name} has more than 8 bits a channel: convert it to 8 bits, rounding as you mean it")
    if not as_stored and image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data and not as_stored:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < OPAQUE:
            raise UnsuitedImage(f"{name} is transparent in part: put it on a background of your choice")
    elif image.mode not in MODES:
        raise UnsuitedImage(f"{name} is in the mode {image.mode}, not one of {', '.join(MODES)}: convert it to RGB")
    return image.convert("RGB")


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel, of which PIL would keep the upper 8; seen before pixels are loaded."""
    return any("16" in str(tile[3]) for tile in getattr(image, "tile", ()) if image.format in ("PNG", "TIFF", "PPM"))
