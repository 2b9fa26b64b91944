"""Decode image files and arrays into uint8 arrays `[C, H, W]`; docs/images.md says what becomes of unusual ones.

A file that cannot be read, and a value that would have to be clipped, raise a `UserError` that gives the reason.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ..utils.errors import UserError, in_one_line
from ..utils.text import nearest

_URL_TIMEOUT_SECONDS = 60  # without a byte from the server


@dataclass(frozen=True)
class DecodeOptions:
    """How the images of a dataset are decoded; a setting that has no meaning raises a UserError."""

    channels: int = 3  # 1 (grey) or 3 (RGB) for image files; any number for arrays, which must have just as many
    resolution: tuple[int, int] | None = None  # (height, width), or `None` to keep each image's own
    background: str = "white"  # the colour under transparent pixels, as a name or #rrggbb
    # The values that become 0 and 255, for arrays and TIFF files; if it is stated it holds for uint8 and bool, too.
    value_range: tuple[float, float] | None = None
    array_layout: str | None = None  # HWC or CHW, for arrays whose shape fits both
    crop: str = "center"  # or random, for images of another shape than `resolution`
    on_bad_image: str = "error"  # or skip; either way every unreadable image is named
    memory_limit_bytes: int = 4 * 2**30  # images that take more as uint8 are decoded when a batch asks for them
    num_workers: int = 4  # threads that decode
    shuffle_buffer: int = 4096  # how many images of a stream are mixed at any time
    report: Callable[[str], object] = warnings.warn  # is called with each warning

    def __post_init__(self) -> None:
        for name, least in (("channels", 1), ("memory_limit_bytes", 0), ("num_workers", 0), ("shuffle_buffer", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        choices = {"crop": ("center", "random"), "on_bad_image": ("error", "skip"), "array_layout": ("HWC", "CHW")}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known and (name, value) != ("array_layout", None):
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
        if self.resolution is not None and (len(self.resolution) != 2 or min(self.resolution) < 1):
            raise UserError(f"resolution must be (height, width), both positive, got {self.resolution}")
        try:
            _red, _green, _blue = tuple(ImageColor.getrgb(self.background))
        except ValueError:  # it is no colour, or has an alpha
            raise UserError(f"background must be a colour such as white or #808080, got {self.background!r}") from None
        low, high = self.value_range or (0, 1)
        if not -math.inf < low < high < math.inf:
            raise UserError(f"--value_range must be two numbers, the lower one first, such as 0 1, got {low} {high}")


# A file, its bytes, its URL, or what `datasets` has for an image that it has not decoded: {"bytes", "path"} or None.
Encoded = Path | bytes | str | dict[str, Any] | None
Decoded = np.ndarray | ValueError  # an image `[C, H, W]`, or why there is none


def read_bytes(source: Encoded) -> bytes:
    """Read an image file; URLs may also be those that `datasets` makes, such as `zip://a.png::b.zip`.

    Raises a ConnectionError if a server cannot be reached or fails; else OSError, or what `fsspec` raises.
    """
    if isinstance(source, dict):
        return read_bytes(source["path"] if source["bytes"] is None else source["bytes"])
    if source is None or isinstance(source, bytes):
        return source or b""  # of a missing image, read_image says that it is empty
    if isinstance(source, Path) or "://" not in source:
        return Path(source).read_bytes()
    on_the_web = source.lower().startswith(("http://", "https://"))
    try:
        if not on_the_web:
            from datasets.utils.file_utils import xopen

            with xopen(source, "rb") as file:
                return file.read()
        url = quote(source, safe="!#$%&'()*+,/:;=?@[]~")  # spaces and the like, as browsers do it
        with urlopen(Request(url, headers={"User-Agent": "ddpm_hf"}), timeout=_URL_TIMEOUT_SECONDS) as response:
            return response.read()
    except FileNotFoundError:  # whose text in fsspec may be a part of the name, or nothing
        raise FileNotFoundError(f"there is no {source}") from None
    except HTTPError as error:
        error.close()
        kind = ConnectionError if error.code >= 500 or error.code in (408, 429) else OSError
        raise kind(f"cannot read {source}: {error}") from None
    except (OSError, HTTPException) as error:
        kind = ConnectionError if on_the_web or isinstance(error, ConnectionError) else OSError
        raise kind(f"cannot read {source}: {in_one_line(error)}") from error


def read_image(source: Encoded | Image.Image, options: DecodeOptions, crop_seed: int | None = None) -> np.ndarray:
    """Decode an image file (see `read_bytes`) or an open image as uint8 `[C, H, W]`; for `crop_seed` see `crop_box`.

    Raises a UserError with the reason, without the file's name; a ConnectionError where a server cannot be reached.
    """
    content = b""
    try:
        if isinstance(source, Image.Image):
            return _to_pixels(source, options, crop_seed)
        content = read_bytes(source)
        with Image.open(io.BytesIO(content)) as image:
            return _to_pixels(image, options, crop_seed)
    except (MemoryError, ConnectionError):
        raise  # the fault of the machine or of the network, not the file's
    except UnidentifiedImageError:
        what = f"not an image of a known format; it begins with {content[:12]!r}"
        raise UserError(what if content else "the file is empty (0 bytes)") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything for damaged bytes: OSError, SyntaxError, struct.error, ...
        raise UserError(getattr(error, "strerror", None) or in_one_line(error)) from error


def _to_pixels(image: Image.Image, options: DecodeOptions, crop_seed: int | None) -> np.ndarray:
    """Convert an open image to uint8 `[C, H, W]`."""
    if options.channels not in (1, 3):
        network = f"the network has in_channels={options.channels}"
        raise UserError(f"image files have 1 or 3 channels, and {network}; give the images as .npy arrays")
    image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if image.mode == "F":
        if options.value_range is None:
            raise UserError("32-bit float pixels have no range of their own; state it, for example --value_range 0 1")
        image = Image.fromarray(scale_to_uint8(np.asarray(image), options.value_range))
    elif image.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips at 255.
        values = np.asarray(image).astype(np.float64)
        stated = options.value_range if image.mode == "I" else None
        image = Image.fromarray(scale_to_uint8(values, stated or (0, 65535)))
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
            image = Image.merge("LA", (image, alpha))
    elif isinstance(transparent, tuple) and max(transparent) > 255:
        raise UserError("one transparent colour of 16 bits, of which Pillow gives 8; save it with an alpha channel")
    # Pillow knows no direct way from these to all others.
    image = image.convert({"La": "LA", "LAB": "RGB"}.get(image.mode, image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, options.background), image)
    image = image.convert("L" if options.channels == 1 else "RGB")
    pixels = np.asarray(_crop_and_resize(image, options.resolution, crop_seed))
    return pixels[None] if options.channels == 1 else pixels.transpose(2, 0, 1)


def crop_box(
    height: int, width: int, resolution: tuple[int, int], crop_seed: int | None = None
) -> tuple[int, int, int, int]:
    """Return the largest box of the target's shape, in whole pixels, as `(left, top, right, bottom)`.

    It is in the centre, or `crop_seed` chooses one of all places. Cropped first, images that fit keep their pixels.
    """
    target_height, target_width = resolution
    box_height = min(height, max(1, round(width * target_height / target_width)))
    box_width = min(width, max(1, round(height * target_width / target_height)))
    slack_y, slack_x = height - box_height, width - box_width
    top, left = slack_y // 2, slack_x // 2
    if crop_seed is not None:
        # A hash and not a library's generator: the same place on every machine and in every version.
        digest = hashlib.blake2b(str(crop_seed).encode(), digest_size=8).digest()
        top = int.from_bytes(digest[:4], "little") * (slack_y + 1) >> 32
        left = int.from_bytes(digest[4:], "little") * (slack_x + 1) >> 32
    return left, top, left + box_width, top + box_height


def _crop_and_resize(image: Image.Image, resolution: tuple[int, int] | None, crop_seed: int | None) -> Image.Image:
    if resolution is None or (image.height, image.width) == resolution:
        return image
    image, size = image.crop(crop_box(image.height, image.width, resolution, crop_seed)), resolution[::-1]
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def scale_to_uint8(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Scale `value_range` to 0..255, rounded; a UserError for NaN, and for a value that would have to be clipped."""
    low, high = value_range
    scaled = np.rint((np.asarray(values, dtype=np.float64) - low) / (high - low) * 255)
    outside = ~((scaled >= 0) & (scaled <= 255))  # true for NaN as well
    if outside.any():
        raise UserError(f"the value {values[outside].flat[0]} is outside the range {low:g} to {high:g}")
    return scaled.astype(np.uint8)


def read_array(array: np.ndarray, options: DecodeOptions, crop_seed: int | None = None) -> np.ndarray:
    """Convert one array `[C, H, W]` to uint8; raises a UserError for numbers outside their range, or without one."""
    if options.value_range is not None:
        pixels = scale_to_uint8(array, options.value_range)
    elif array.dtype == np.uint8:
        pixels = np.asarray(array)
    elif array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * 255
    else:
        advice = "state what becomes black and white, for example --value_range 0 1 or --value_range 0 255"
        raise UserError(f"{array.dtype} values have no range of their own; {advice}")
    if options.resolution is None or pixels.shape[1:] == options.resolution:
        return pixels
    return np.stack([np.asarray(_crop_and_resize(Image.fromarray(x), options.resolution, crop_seed)) for x in pixels])


def decode_all(
    sources: Sequence[Any], options: DecodeOptions, crop_seeds: Sequence[int] | None = None
) -> list[Decoded]:
    """Decode images (for `read_image` or `read_array`) in threads; errors are returned, so that all can be named."""
    seeds = crop_seeds if crop_seeds is not None and options.crop == "random" else [None] * len(sources)

    def decode(i: int) -> Decoded:
        try:
            return (read_array if isinstance(sources[i], np.ndarray) else read_image)(sources[i], options, seeds[i])
        except ValueError as error:
            return error

    threads = min(options.num_workers, len(sources))
    if threads <= 1:
        return [decode(i) for i in range(len(sources))]
    # Each thread takes every `threads`-th image: to hand out small ones singly costs more than to decode them.
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda first: [decode(i) for i in range(first, len(sources), threads)], range(threads)))
    return [parts[i % threads][i // threads] for i in range(len(sources))]


def refuse_bad(bad: Mapping[str, ValueError], total: int, options: DecodeOptions, what: str = "images") -> None:
    """Raise a UserError that names the unreadable ones (`bad`: name to reason) of `total`, unless they are skipped."""
    if not bad or options.on_bad_image != "error":
        return
    by_reason: dict[str, list[str]] = {}
    for where, error in bad.items():
        by_reason.setdefault(str(error), []).append(where)
    if len(by_reason) == 1 and len(bad) == total > 1:
        raise UserError(f"cannot read any of the {total} {what}, such as {next(iter(bad))}: {next(iter(by_reason))}")
    named = set(list(bad)[:20])
    parts = [([name for name in names if name in named], reason) for reason, names in by_reason.items()]
    reasons = "; ".join(f"{', '.join(names)} ({reason})" for names, reason in parts if names)
    advice = "fix or remove them, or leave them out with --on_bad_image skip, which names all"
    raise UserError(f"cannot read {len(bad)} of {total} {what}: {reasons}{' ...' * (len(bad) > 20)}; {advice}")


def leave_out_bad(bad: Mapping[str, ValueError], total: int, options: DecodeOptions, what: str = "images") -> None:
    """Report unreadable images as left out, or raise as `refuse_bad`, or because none can be read."""
    refuse_bad(bad, total, options, what)
    for where, error in bad.items():
        options.report(f"left out {where}: {error}")
    if bad and len(bad) == total:
        raise UserError(f"none of the {total} {what} can be read; the first: {next(iter(bad.values()))}")
