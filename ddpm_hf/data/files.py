"""One image file or array in, one uint8 array `[C, H, W]` out. What becomes of unusual images:

| image | becomes |
|---|---|
| palette, 1-bit, CMYK, YCbCr | its colours as RGB (or grey) |
| alpha, transparent palette entry or colour | composited on `background` (white by default) |
| 16-bit grey | scaled to 8 bits (level / 257, rounded), not clipped |
| 32-bit whole numbers | as 16-bit grey, or from the stated range |
| 16-bit colour | the upper 8 bits, which is all that Pillow gives |
| EXIF orientation | turned upright |
| animated | its first frame |
| another shape | the largest part of the target's shape, from the centre or at a random place, resized (antialiased) |
| float TIFF, array of floats or of wide integers | scaled from its stated range; refused without one |

A file that cannot be read, and a value that would have to be clipped, are `ValueError`s that give the reason.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ..utils.errors import UserError

ARRAY_SUFFIXES = (".npy", ".npz")
ARRAY_LAYOUTS = ("HWC", "CHW")
# Names of the images and of their labels in .npz files: the plain ones, and those that numpy.savez makes up.
_IMAGE_KEYS, _LABEL_KEYS = ("images", "arr_0"), ("labels", "arr_1")
_SECONDS_FOR_A_URL = 60  # without a byte from its server


@dataclass(frozen=True)
class ImageFormat:
    """What every image is made into.

    Attributes:
        channels: 1 (grey) or 3 (RGB) for image files; any number for arrays, which must have just as many.
        resolution: `(height, width)`, or `None` to keep each image's own.
        background: Colour under transparent pixels, as a name or `#rrggbb`.
        value_range: The values that become 0 and 255, for arrays and TIFF files of floats or 32-bit numbers. Arrays of
            uint8 and bool need none; if it is stated it holds for them too.
        array_layout: `HWC` or `CHW` for arrays whose shape fits both; `None` to go by the number of channels.

    Raises:
        ValueError: A setting that has no meaning.
    """

    channels: int = 3
    resolution: tuple[int, int] | None = None
    background: str = "white"
    value_range: tuple[float, float] | None = None
    array_layout: str | None = None

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise UserError(f"channels must be at least 1, got {self.channels}")
        if self.resolution is not None and (len(self.resolution) != 2 or min(self.resolution) < 1):
            raise UserError(f"resolution must be (height, width), both positive, got {self.resolution}")
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except (ValueError, AttributeError):
            opaque = False
        if not opaque:
            raise UserError(f"background must be a colour such as white or #808080, got {self.background!r}")
        if self.value_range is not None:
            low, high = self.value_range
            if not (np.isfinite(low) and np.isfinite(high) and low < high):
                raise UserError(
                    f"value_range must be two numbers, the lower one first, such as 0 1, got {self.value_range}"
                )
        if self.array_layout not in (None, *ARRAY_LAYOUTS):
            raise UserError(f"array_layout must be one of {', '.join(ARRAY_LAYOUTS)}, got {self.array_layout!r}")


# ---------------------------------------------------------------------- image files


def read_bytes(source: Path | bytes | str) -> bytes:
    """The encoded bytes of an image file.

    Args:
        source: The file, its bytes, or its URL: `https://...`, or as `datasets` writes it: `hf://...`,
            `zip://a.png::images.zip`.

    Raises:
        ConnectionError: The server of a URL cannot be reached.
        OSError, ValueError: It cannot be read; also in the other errors of `fsspec`, which knows many kinds of URLs.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        return source.read_bytes()
    if source.lower().startswith(("http://", "https://")):
        return _download(source)
    from datasets.utils.file_utils import xopen

    try:
        with xopen(source, "rb") as file:
            return file.read()
    except ConnectionError as error:
        raise ConnectionError(f"cannot read {source}: {error}") from error
    except FileNotFoundError:  # which fsspec may say with a part of the name alone, or without
        raise FileNotFoundError(f"there is no {source}") from None
    except ImportError as error:
        raise UserError(f"cannot read {source}: {' '.join(str(error).split())}") from None


def _download(url: str) -> bytes:
    """The bytes at a web address.

    Raises:
        ConnectionError: Its server cannot be reached, breaks off, is overloaded or fails.
        OSError: It answers that there is no such file, or that it does not give it.
    """
    # Characters that may not be in a URL, such as spaces, as browsers do it.
    request = Request(quote(url, safe="!#$%&'()*+,/:;=?@[]~"), headers={"User-Agent": "ddpm_hf"})
    try:
        with urlopen(request, timeout=_SECONDS_FOR_A_URL) as response:
            return response.read()
    except HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(f"there is no {url}") from None
        said = f"cannot read {url}: the server answers {error.code} {error.reason}"
        raise (ConnectionError if error.code >= 500 or error.code in (408, 429) else OSError)(said) from None
    except (OSError, HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise ConnectionError(f"cannot read {url}: {reason}") from error


def read_image(
    source: Path | bytes | str | Image.Image, form: ImageFormat, crop_seed: int | None = None
) -> np.ndarray:
    """One image file, its bytes, its URL, or an image that is open already, as uint8 `[C, H, W]`.

    Args:
        source: Where the image is; see `read_bytes`.
        form: What to make of it.
        crop_seed: Crop at a random place, which depends on this number only; from the centre if `None`.

    Raises:
        ValueError: It cannot be read, or not be made into that; the reason, without the file's name.
        ConnectionError: The server of a URL cannot be reached.
    """
    try:
        if isinstance(source, str):
            source = read_bytes(source)
        if isinstance(source, Image.Image):
            return _pixels(source, form, crop_seed)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _pixels(image, form, crop_seed)
    except (MemoryError, ConnectionError):
        raise  # the fault of the machine or of the network, not the file's
    except UnidentifiedImageError:
        raise UserError(_what_it_is_instead(source)) from None
    except Exception as error:
        # Pillow's decoders raise nearly anything for damaged bytes: OSError, SyntaxError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(" ".join(reason.split()) or type(error).__name__) from error


def decode_image(
    image: Image.Image,
    channels: int = 3,
    resolution: tuple[int, int] | None = None,
    background: str = "white",
    value_range: tuple[float, float] | None = None,
    crop_seed: int | None = None,
) -> np.ndarray:
    """One PIL image as uint8 `[C, H, W]`; the arguments are those of [`ImageFormat`] and [`read_image`].

    Raises:
        ValueError: The image is damaged, or has no meaning here; the reason.
    """
    return read_image(image, ImageFormat(channels, resolution, background, value_range), crop_seed)


def _what_it_is_instead(source: Path | bytes | str | Image.Image) -> str:
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(12)
    else:
        start = source[:12] if isinstance(source, bytes) else b""
    if not start:
        return "the file is empty (0 bytes)"
    return f"not an image of a known format; it begins with {start!r}"


def _pixels(image: Image.Image, form: ImageFormat, crop_seed: int | None) -> np.ndarray:
    if form.channels not in (1, 3):
        raise UserError(
            f"image files have 1 or 3 channels, and the network has in_channels={form.channels}; give the images as "
            ".npy arrays"
        )
    image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if image.mode == "F":
        if form.value_range is None:
            raise UserError("32-bit float pixels have no range of their own; state it, for example --value_range 0 1")
        image = Image.fromarray(to_levels(np.asarray(image), form.value_range))
    elif image.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips at 255.
        levels = np.asarray(image).astype(np.float64)
        stated = form.value_range if image.mode == "I" else None
        grey = Image.fromarray(to_levels(levels, stated or (0, 65535)))
        image = grey
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
            image = Image.merge("LA", (grey, alpha))
    elif isinstance(transparent, tuple) and max(transparent) > 255:
        raise UserError(
            "16-bit colour with one transparent colour: Pillow gives only the upper 8 bits, in which that colour "
            "cannot be told from its neighbours; save the image with an alpha channel"
        )
    # Pillow knows no direct way from these to all others.
    image = image.convert({"La": "LA", "LAB": "RGB"}.get(image.mode, image.mode))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, form.background), image)
    image = image.convert("L" if form.channels == 1 else "RGB")
    pixels = np.asarray(_fit(image, form.resolution, crop_seed))
    return pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)


def crop_box(
    height: int, width: int, resolution: tuple[int, int], crop_seed: int | None = None
) -> tuple[int, int, int, int]:
    """The largest box of the target's shape, in whole pixels, as `(left, top, right, bottom)`.

    Cropping comes before resizing, so that an image which only has to be cropped keeps its pixels as they are.

    Args:
        height, width: Of the image.
        resolution: `(height, width)` of the target.
        crop_seed: Chooses one of all places with equal probability; the centre if `None`.
    """
    target_height, target_width = resolution
    box_height, box_width = height, width
    if width * target_height > height * target_width:
        box_width = max(1, round(height * target_width / target_height))
    else:
        box_height = max(1, round(width * target_height / target_width))
    slack_y, slack_x = height - box_height, width - box_width
    if crop_seed is None:
        top, left = slack_y // 2, slack_x // 2
    else:
        # A hash and not a library's generator: the same place on every machine and in every version.
        digest = hashlib.blake2b(str(crop_seed).encode(), digest_size=8).digest()
        top = int.from_bytes(digest[:4], "little") * (slack_y + 1) >> 32
        left = int.from_bytes(digest[4:], "little") * (slack_x + 1) >> 32
    return left, top, left + box_width, top + box_height


def _fit(image: Image.Image, resolution: tuple[int, int] | None, crop_seed: int | None) -> Image.Image:
    if resolution is None or image.size == resolution[::-1]:
        return image
    image = image.crop(crop_box(image.height, image.width, resolution, crop_seed))
    return image if image.size == resolution[::-1] else image.resize(resolution[::-1], Image.Resampling.LANCZOS)


# ---------------------------------------------------------------------- arrays


def to_levels(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Values of a stated range as uint8: the lower end becomes 0, the upper 255, linear and rounded in between.

    Raises:
        ValueError: A value that would have to be clipped (it rounds to a level outside 0..255), or is not a number.
    """
    low, high = value_range
    levels = np.rint((np.asarray(values, dtype=np.float64) - low) / (high - low) * 255)
    outside = ~((levels >= 0) & (levels <= 255))  # true for NaN as well
    if outside.any():
        raise UserError(f"the value {values[outside].flat[0]} is outside the range {low:g} to {high:g}")
    return levels.astype(np.uint8)


def read_array(array: np.ndarray, form: ImageFormat, crop_seed: int | None = None) -> np.ndarray:
    """One image of numbers `[C, H, W]` as uint8 `[C, H, W]`; see [`read_image`].

    Raises:
        ValueError: Numbers without a stated range, or outside it.
    """
    if form.value_range is not None:
        pixels = to_levels(array, form.value_range)
    elif array.dtype == np.uint8:
        pixels = np.asarray(array)
    elif array.dtype == np.bool_:
        pixels = array.astype(np.uint8) * 255
    else:
        raise UserError(
            f"{array.dtype} values have no range of their own; state what becomes black and white, for example "
            "--value_range 0 1, --value_range -1 1 or --value_range 0 255"
        )
    if form.resolution is None or pixels.shape[1:] == form.resolution:
        return pixels
    return np.stack([np.asarray(_fit(Image.fromarray(x), form.resolution, crop_seed)) for x in pixels])


def open_arrays(path: Path, form: ImageFormat, stack_only: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of a `.npy` or `.npz` file as `[N, C, H, W]`, and their labels `[N]` if the file has them.

    One image (`HW`, `HWC`, `CHW`) is a stack of one. A `.npy` file is mapped into memory, not read. Pickles never are.

    Args:
        path: The file. In a `.npz` file the images are called `images` or `arr_0`, or are all there is; labels are
            called `labels` or `arr_1`.
        form: Its `channels` and `array_layout` tell the axes apart.
        stack_only: Refuse a two-dimensional array, which in a file of many images can only be flattened ones.

    Raises:
        ValueError: It cannot be read, or its shape or type has no meaning here; the reason, without the file's name.
    """
    labels = None
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as members:
                images = members[_only_key(members.files)]
                label_key = next((key for key in _LABEL_KEYS if key in members.files), None)
                labels = None if label_key is None else members[label_key]
        else:
            with path.open("rb") as file:
                start = file.read(6)
            if start != b"\x93NUMPY":
                raise UserError(f"not a .npy file; it begins with {start!r}" if start else "the file is empty")
            images = np.load(path, mmap_mode="r", allow_pickle=False)
    except zipfile.BadZipFile:
        raise UserError("not a .npz file, or a truncated one") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged headers end in SyntaxError, EOFError, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Python objects" in reason or "Object arrays" in reason:
            reason = "it holds Python objects (a pickle), which are never read; save it as an array of numbers"
        raise UserError(reason) from None
    if images.dtype.kind not in "buif":
        raise UserError(f"its values are of type {images.dtype}, not numbers")
    images = _as_nchw(images, form, stack_only)
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iuU"):
        raise UserError(
            f"labels must be whole numbers or strings of shape ({len(images)},), got {labels.dtype} {labels.shape}"
        )
    return images, labels


def _only_key(keys: list[str]) -> str:
    found = next((key for key in _IMAGE_KEYS if key in keys), None)
    rest = [key for key in keys if key not in _LABEL_KEYS]
    if found is None and len(rest) != 1:
        raise UserError(f"it holds the arrays {', '.join(keys) or '(none)'}; call the one with the images 'images'")
    return found or rest[0]


def _as_nchw(images: np.ndarray, form: ImageFormat, stack_only: bool) -> np.ndarray:
    """A view `[N, C, H, W]` of a stack of images or of one image."""
    shape, channels = images.shape, form.channels
    if 0 in shape:
        raise UserError(f"its shape {shape} holds no pixels")
    wanted = f"in_channels={channels}"
    if images.ndim == 2 and channels == 1 and not stack_only:
        return images[None, None]
    if images.ndim in (3, 4):
        first, last = shape[-3] == channels, shape[-1] == channels
        if images.ndim == 3 and channels == 1 and not (first or last):
            return images[:, None]  # N, H, W
        if first and last:
            if form.array_layout is None:
                raise UserError(
                    f"its shape {shape} has {channels} at either place for channels; say which it is with "
                    "--array_layout CHW or HWC"
                )
            first = form.array_layout == "CHW"
        if first or last:
            stack = images if images.ndim == 4 else images[None]
            return stack if first else stack.transpose(0, 3, 1, 2)
    raise UserError(
        f"its shape {shape} does not fit {wanted}; what does: [N, H, W, {channels}], [N, {channels}, H, W]"
        + (", [N, H, W]" if channels == 1 else "")
        + ("" if stack_only else ", or the same without N for one image")
    )
