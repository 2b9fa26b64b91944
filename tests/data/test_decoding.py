"""One image in: what becomes of each kind of file and array. The expected pixels are worked out here."""

import io
import struct
import threading
import warnings
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data.datasets import load_images
from ddpm_hf.data.decoding import DecodeOptions, crop_box, read_array, read_bytes, read_image, scale_to_uint8
from ddpm_hf.data.folders import open_arrays

# ---------------------------------------------------------------------- files made by hand


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_by_hand(samples, colour_type, bits=16, transparent=None):
    """A PNG with what Pillow cannot write: `samples` is `[H, W]` or `[H, W, C]`."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in samples)
    colour_key = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + colour_key
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff_by_hand(samples, order="<", sample_format=1):
    """An uncompressed one-channel TIFF in either byte order; sample format 1 is unsigned, 2 signed, 3 float."""
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    height, width = samples.shape
    entries = [(256, width), (257, height), (258, samples.itemsize * 8), (259, 1), (262, 1), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(data)), (339, sample_format)]
    directory = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        directory += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8 + len(data)) + data + directory + bytes(4)


LEVELS = np.array([[0, 40, 80], [120, 200, 255]], dtype=np.uint8)
COLOURS = np.array([[[200, 30, 60], [0, 0, 0]], [[10, 250, 90], [255, 255, 255]]], dtype=np.uint8)
ALPHA = np.array([[255, 0], [128, 51]], dtype=np.uint8)
DEEP = np.array([[0, 127, 129, 300], [25700, 25828, 25829, 65535]], dtype=np.uint16)


def grey_as_rgb(levels):
    return np.repeat(np.asarray(levels)[None], 3, axis=0)


def as_chw(pixels):
    return np.asarray(pixels).transpose(2, 0, 1)


def over(pixels, alpha, background):
    """Composited, by the formula."""
    share = np.asarray(alpha)[..., None] / 255
    return np.rint(np.asarray(pixels) * share + np.asarray(background) * (1 - share))


def rgba(pixels=COLOURS, alpha=ALPHA):
    return Image.fromarray(np.dstack([pixels, alpha]))


def palette():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P")
    image.putpalette([200, 30, 60, 10, 250, 90, 0, 0, 255])
    return image


PALETTE_COLOURS = np.array([[[200, 30, 60], [10, 250, 90]], [[0, 0, 255], [10, 250, 90]]])
WHITE, GREEN = (255, 255, 255), (0, 128, 0)
TURNED = {  # what each EXIF orientation does to the stored rows
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a, 1),
}


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(LEVELS), "PNG", exif=exif)


def animation(kind, **options):
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, (0, 0, 255))]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


RED = (255, 0, 0)
CMYK = np.broadcast_to(np.array([51, 102, 153, 51], dtype=np.uint8), (2, 2, 4))
# (1 - C) (1 - K), (1 - M) (1 - K), (1 - Y) (1 - K)
CMYK_AS_RGB = np.broadcast_to(np.rint(255 * 0.8 * np.array([0.8, 0.6, 0.4])), (2, 2, 3))
CLEAR_COLOUR = np.array([[0, 300, 300, 300]] * 2)

# name: (the file, the image's format, what it gives)
ODD_IMAGES = {
    "rgb": (saved(Image.fromarray(COLOURS), "PNG"), {}, as_chw(COLOURS)),
    "rgb in bmp": (saved(Image.fromarray(COLOURS), "BMP"), {}, as_chw(COLOURS)),
    "rgb, lossless webp": (saved(Image.fromarray(COLOURS), "WEBP", lossless=True, exact=True), {}, as_chw(COLOURS)),
    "rgb to grey": (
        saved(Image.fromarray(COLOURS), "PNG"),
        {"channels": 1},
        np.rint(COLOURS @ np.array([0.299, 0.587, 0.114]))[None],  # ITU-R 601
    ),
    "grey": (saved(Image.fromarray(LEVELS), "PNG"), {"channels": 1}, LEVELS[None]),
    "grey to rgb": (saved(Image.fromarray(LEVELS), "PNG"), {}, grey_as_rgb(LEVELS)),
    "1-bit": (saved(Image.fromarray(LEVELS > 100), "PNG"), {"channels": 1}, (LEVELS > 100)[None] * 255),
    "1-bit tiff": (saved(Image.fromarray(LEVELS > 100), "TIFF"), {}, grey_as_rgb(LEVELS > 100) * 255),
    "palette": (saved(palette(), "PNG"), {}, as_chw(PALETTE_COLOURS)),
    "palette in gif": (saved(palette(), "GIF"), {}, as_chw(PALETTE_COLOURS)),
    "palette, one entry transparent": (
        saved(palette(), "PNG", transparency=1),
        {},
        as_chw(over(PALETTE_COLOURS, [[255, 0], [255, 0]], WHITE)),
    ),
    "palette, several alphas": (
        saved(palette(), "PNG", transparency=bytes([255, 0, 51])),
        {"background": "#008000"},
        as_chw(over(PALETTE_COLOURS, [[255, 0], [51, 0]], GREEN)),
    ),
    "palette and alpha (PA)": (
        palette().convert("PA"),
        {},
        as_chw(PALETTE_COLOURS),
    ),
    "rgba on white": (saved(rgba(), "PNG"), {}, as_chw(over(COLOURS, ALPHA, WHITE))),
    "rgba on green": (saved(rgba(), "PNG"), {"background": "green"}, as_chw(over(COLOURS, ALPHA, GREEN))),
    "rgba in webp": (
        saved(rgba(), "WEBP", lossless=True, exact=True),
        {"background": "black"},
        as_chw(over(COLOURS, ALPHA, 0)),
    ),
    "premultiplied rgba": (rgba(alpha=np.full((2, 2), 255, np.uint8)).convert("RGBa"), {}, as_chw(COLOURS)),
    "grey and alpha": (
        saved(Image.merge("LA", (Image.fromarray(COLOURS[..., 0]), Image.fromarray(ALPHA))), "PNG"),
        {"channels": 1, "background": "black"},
        np.rint(COLOURS[..., 0] * (ALPHA / 255))[None],
    ),
    "premultiplied grey and alpha": (
        Image.merge("LA", (Image.fromarray(LEVELS), Image.new("L", (3, 2), 255))).convert("La"),
        {"channels": 1},
        LEVELS[None],
    ),
    "rgb, one transparent colour": (
        saved(Image.fromarray(COLOURS), "PNG", transparency=(10, 250, 90)),
        {"background": "green"},
        as_chw(over(COLOURS, [[255, 255], [0, 255]], GREEN)),
    ),
    "grey, one transparent level": (
        saved(Image.fromarray(LEVELS), "PNG", transparency=80),
        {"channels": 1},
        np.where(LEVELS == 80, 255, LEVELS)[None],
    ),
    "16-bit grey png": (png_by_hand(DEEP, 0), {"channels": 1}, np.rint(DEEP / 257)[None]),
    "16-bit grey tiff": (tiff_by_hand(DEEP), {"channels": 1}, np.rint(DEEP / 257)[None]),
    "16-bit grey tiff, big-endian": (tiff_by_hand(DEEP, ">"), {}, grey_as_rgb(np.rint(DEEP / 257))),
    "16-bit grey pgm": (
        b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes(),
        {"channels": 1},
        np.rint(DEEP / 257)[None],
    ),
    "12-bit grey pgm": (
        b"P5 2 1 4095\n" + np.array([4095, 1365], dtype=">u2").tobytes(),
        {"channels": 1},
        np.array([[[255, 85]]]),
    ),
    "16-bit grey, one transparent level": (
        png_by_hand(DEEP, 0, transparent=(300,)),
        {"channels": 1, "background": "#646464"},
        np.where(DEEP == 300, 100, np.rint(DEEP / 257))[None],
    ),
    "16-bit rgb": (png_by_hand(np.dstack([DEEP] * 3), 2), {}, grey_as_rgb(DEEP >> 8)),
    "16-bit rgba": (
        png_by_hand(np.dstack([DEEP, DEEP, DEEP, CLEAR_COLOUR * 218]), 6),
        {"background": "black"},
        grey_as_rgb(np.where(CLEAR_COLOUR > 0, DEEP >> 8, 0)),
    ),
    "cmyk tiff": (saved(Image.fromarray(CMYK, mode="CMYK"), "TIFF"), {}, as_chw(CMYK_AS_RGB)),
    "cmyk jpeg, inverted as Adobe does": (
        saved(Image.fromarray(CMYK, mode="CMYK"), "JPEG", quality=100, subsampling=0),
        {},
        as_chw(CMYK_AS_RGB),
    ),
    "lab": (Image.new("LAB", (2, 2), (255, 128, 128)), {"channels": 1}, np.full((1, 2, 2), 255)),
    "animated gif": (animation("GIF"), {}, as_chw(np.broadcast_to(RED, (2, 2, 3)))),
    "animated png": (animation("PNG"), {}, as_chw(np.broadcast_to(RED, (2, 2, 3)))),
    "animated webp": (animation("WEBP", lossless=True), {}, as_chw(np.broadcast_to(RED, (2, 2, 3)))),
    "tiff of several pages": (animation("TIFF"), {}, as_chw(np.broadcast_to(RED, (2, 2, 3)))),
    "float tiff, range stated": (
        tiff_by_hand(np.array([[-1, 0, 0.5, 1]], dtype=np.float32), sample_format=3),
        {"channels": 1, "value_range": (-1, 1)},
        np.array([[[0, 128, 191, 255]]]),
    ),
    "one pixel": (
        saved(Image.new("RGB", (1, 1), RED), "PNG"),
        {"resolution": (4, 6)},
        as_chw(np.broadcast_to(RED, (4, 6, 3))),
    ),
    "wide": (saved(Image.fromarray(LEVELS), "PNG"), {"channels": 1, "resolution": (2, 2)}, LEVELS[None, :, :2]),
    "tall": (saved(Image.fromarray(LEVELS.T), "PNG"), {"channels": 1, "resolution": (2, 2)}, LEVELS.T[None, :2]),
    "to a shape that is not square": (
        saved(Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6)), "PNG"),
        {"channels": 1, "resolution": (2, 6)},
        np.arange(12, 24).reshape(1, 2, 6),
    ),
    **{f"exif orientation {n}": (turned(n), {"channels": 1}, turn(LEVELS)[None]) for n, turn in TURNED.items()},
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_what_becomes_of_an_odd_image(name, tmp_path):
    source, options, expected = ODD_IMAGES[name]
    pixels = read_image(source, DecodeOptions(**options))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == np.asarray(expected).astype(int).tolist()
    if isinstance(source, bytes):  # from a file as from memory, whatever the file's ending says
        (tmp_path / "file.png").write_bytes(source)
        assert np.array_equal(read_image(tmp_path / "file.png", DecodeOptions(**options)), pixels)


def test_there_are_more_than_thirty_odd_images():
    assert len(ODD_IMAGES) + len(BAD_IMAGES) > 60


def test_all_16_bit_levels_are_scaled_and_rounded():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(read_image(Image.fromarray(levels), DecodeOptions(1))[0], np.rint(levels / 257))


# ---------------------------------------------------------------------- shape


def lanczos(line, length):
    """One row resampled by the definition: Lanczos kernel of 3 lobes, widened by the factor of reduction."""
    scale = len(line) / length
    support = max(scale, 1.0)
    centres = (np.arange(length) + 0.5) * scale
    distance = (np.arange(len(line)) + 0.5 - centres[:, None]) / support
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return (weights / weights.sum(1, keepdims=True)) @ line


@pytest.mark.parametrize("resolution", [(8, 8), (40, 40), (5, 5), (1, 1)])
def test_resizing_is_antialiased_lanczos(resolution):
    picture = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint8)
    expected = np.apply_along_axis(lanczos, 1, picture.astype(float), resolution[1])
    expected = np.rint(expected.clip(0, 255))  # Pillow keeps whole levels between its two passes
    expected = np.apply_along_axis(lanczos, 0, expected, resolution[0]).clip(0, 255)
    assert np.abs(read_image(Image.fromarray(picture), DecodeOptions(1, resolution))[0] - expected).max() <= 1.01


def test_shrinking_stripes_gives_their_mean():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = read_image(Image.fromarray(stripes), DecodeOptions(1, (8, 8)))
    assert abs(small.astype(int) - 128).max() < 20  # without antialiasing all would be 0 or 255


def test_what_is_cropped_away_does_not_show():
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert read_image(Image.fromarray(wide), DecodeOptions(resolution=(5, 5))).min() == 255


def test_a_crop_is_the_largest_box_of_the_shape_inside_the_image():
    draws = np.random.default_rng(1).integers(1, 60, (500, 4)).tolist()
    for seed, (height, width, *resolution) in enumerate(draws):
        left, top, right, bottom = crop_box(height, width, tuple(resolution), seed)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert right - left == width or bottom - top == height
        # whole pixels: the shape is right to half a pixel of the cropped side
        ratio = resolution[1] / resolution[0]
        wrong_by = min(abs((right - left) - (bottom - top) * ratio), abs((bottom - top) - (right - left) / ratio))
        assert wrong_by < 0.5 + 1e-9 or min(right - left, bottom - top) == 1


def test_random_crops_depend_on_their_seed_and_reach_every_place():
    places = [crop_box(4, 9, (4, 4), seed)[0] for seed in range(3000)]
    assert places == [crop_box(4, 9, (4, 4), seed)[0] for seed in range(3000)]
    assert set(places) == set(range(6))
    assert np.bincount(places).min() > 400  # 500 expected
    assert {crop_box(9, 4, (4, 4), seed)[1] for seed in range(100)} == set(range(6))
    assert crop_box(4, 9, (4, 4)) == (2, 0, 6, 4)


def test_the_same_seed_gives_the_same_places_for_ever():
    assert [crop_box(4, 100, (4, 4), seed)[0] for seed in (0, 1, 2**63 - 1)] == [44, 44, 21]


def test_a_random_crop_keeps_the_pixels():
    picture = np.arange(40, dtype=np.uint8).reshape(4, 10)
    for seed in range(20):
        left = crop_box(4, 10, (4, 4), seed)[0]
        cropped = read_image(Image.fromarray(picture), DecodeOptions(1, (4, 4)), seed)
        assert np.array_equal(cropped[0], picture[:, left : left + 4])


# ---------------------------------------------------------------------- bad files

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
PNG, JPEG = saved(Image.fromarray(NOISE), "PNG"), saved(Image.fromarray(NOISE), "JPEG")
NOT_A_NUMBER = np.array([[0, np.nan]], dtype=np.float32)

# name: (the file, its format, what is said)
BAD_IMAGES = {
    "empty": (b"", {}, r"empty \(0 bytes\)"),
    "text": (b"hello, this is text", {}, "not an image of a known format; it begins with b'hello, this '"),
    "cut within the signature": (PNG[:5], {}, "not an image"),
    "cut within the header": (PNG[:20], {}, "."),
    "cut png": (PNG[:-200], {}, "truncated|broken"),
    "cut jpeg": (JPEG[: len(JPEG) // 2], {}, "truncated"),
    "cut gif": (saved(Image.fromarray(NOISE).convert("P"), "GIF")[:-300], {}, "."),
    "cut webp": (saved(Image.fromarray(NOISE), "WEBP")[:-100], {}, "."),
    "cut tiff": (saved(Image.fromarray(NOISE), "TIFF")[:-300], {}, "."),
    "damaged png": (PNG[:60] + bytes(30) + PNG[90:], {}, "."),
    "decompression bomb": (png_by_hand(np.zeros((1, 1), np.uint8), 0, 8), {}, "exceeds limit"),
    "float tiff, no range": (tiff_by_hand(NOT_A_NUMBER, sample_format=3), {}, r"value_range=\(0, 1\)"),
    "float tiff, not a number": (
        tiff_by_hand(NOT_A_NUMBER, sample_format=3),
        {"value_range": (0, 1)},
        "the value nan is outside the range 0 to 1",
    ),
    "32-bit integers": (tiff_by_hand(np.array([[70000]], dtype=np.uint32)), {}, "value 70000.* outside .* 0 to 65535"),
    "signed 16-bit integers": (
        tiff_by_hand(np.array([[-300]], dtype=np.int16), sample_format=2),
        {},
        "value -300.* outside",
    ),
    "16-bit rgb, one transparent colour": (
        png_by_hand(np.dstack([DEEP] * 3), 2, transparent=(300, 300, 300)),
        {},
        "alpha channel",
    ),
    "two channels asked for": (PNG, {"channels": 2}, "in_channels=2; give the images as .npy"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_said_of_a_bad_image(name, tmp_path):
    source, options, message = BAD_IMAGES[name]
    if name == "decompression bomb":
        source = source.replace(source[16:24], struct.pack(">II", 20000, 20000))  # 400 million pixels, says the header
        source = source[:29] + struct.pack(">I", zlib.crc32(source[12:29])) + source[33:]
    (tmp_path / "file.png").write_bytes(source)
    for where in (source, tmp_path / "file.png"):
        with pytest.raises(ValueError, match=message) as raised:
            read_image(where, DecodeOptions(**options))
        assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_image(tmp_path / "nowhere.png", DecodeOptions())


def test_an_image_at_a_url(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr("in/a.png", PNG)
        file.writestr("b.png", b"hello")
    url = f"zip://in/a.png::{tmp_path}/images.zip"
    assert read_bytes(url) == PNG
    assert np.array_equal(read_image(url, DecodeOptions()), read_image(PNG, DecodeOptions()))
    with pytest.raises(ValueError, match="begins with b'hello'"):
        read_image(f"zip://b.png::{tmp_path}/images.zip", DecodeOptions())
    for gone in (f"zip://c.png::{tmp_path}/images.zip", f"zip://b.png::{tmp_path}/nowhere.zip"):
        with pytest.raises(ValueError, match=rf"there is no {gone}"):
            read_image(gone, DecodeOptions())

    def away(url, mode):
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr("datasets.utils.file_utils.xopen", away)
    with pytest.raises(ConnectionError, match=r"cannot read zip://in/a\.png::.*: Server Disconnected"):
        read_image(url, DecodeOptions())  # no image is bad because of that, and none is to be skipped


@pytest.fixture
def web(monkeypatch):
    """A server on this machine, and what it answers: by path, a status and a body."""
    answers = {"/a b.png": (200, PNG), "/gone.png": (404, b""), "/mine.png": (403, b""), "/busy.png": (503, b"")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/short.png":
                answer, length = (200, PNG[:20]), len(PNG)
            elif self.path == "/slow.png":
                closing.wait(30)
                return
            else:
                answer = answers[unquote(self.path)]
                length = len(answer[1])
            self.send_response(answer[0])
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_):
            pass

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("ddpm_hf.data.decoding._URL_TIMEOUT_SECONDS", 0.3)
    closing = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        closing.set()
        server.shutdown()
        thread.join()


def test_an_image_on_the_web(web):
    """No package but those that this one requires reads it."""
    assert read_bytes(f"{web}/a b.png") == read_bytes(f"{web}/a%20b.png") == PNG
    for name, message in (("gone", "cannot read {}: HTTP Error 404"), ("mine", "cannot read {}: HTTP Error 403")):
        with pytest.raises(ValueError, match=message.format(f"{web}/{name}.png")):
            read_image(f"{web}/{name}.png", DecodeOptions())
    for name, message in (("busy", "HTTP Error 503"), ("short", "IncompleteRead"), ("slow", "timed out")):
        with pytest.raises(ConnectionError, match=f"cannot read {web}/{name}.png: {message}"):
            read_image(f"{web}/{name}.png", DecodeOptions())
    with pytest.raises(ConnectionError, match=r"cannot read http://127\.0\.0\.1:1/a\.png: .*refused"):
        read_image("http://127.0.0.1:1/a.png", DecodeOptions())


def test_tables_of_web_addresses(web, tmp_path):
    urls = {"url": [f"{web}/a b.png", f"{web}/gone.png"]}
    datasets.Dataset.from_dict(urls).to_parquet(tmp_path / "text.parquet")
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {"url": [{"bytes": None, "path": url} for url in urls["url"]]}
    datasets.Dataset.from_dict(rows, datasets.Features(url=image)).to_parquet(tmp_path / "images.parquet")
    expected = read_image(PNG, DecodeOptions(resolution=(4, 4)))
    for name in ("text", "images"):
        options = {"train_data_dir": str(tmp_path / f"{name}.parquet"), "image_column": "url", "resolution": (4, 4)}
        options["cache_dir"] = str(tmp_path / "cache")
        with pytest.raises(
            ValueError, match=f"cannot read 1 of 2 images: image 1 of .*cannot read {web}/gone.png: HTTP Error 404"
        ):
            load_images(**options)
        said = []
        data = load_images(**options, on_bad_image="skip", report=said.append)
        assert np.array_equal(data.images[0].numpy(), expected)
        assert len(data) == len(said) == 1
        stream = load_images(**options, streaming=True, on_bad_image="skip", report=said.append)
        assert np.array_equal(stream.take(5).images[0].numpy(), expected)


def test_no_file_stays_open(tmp_path):
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "bad.png").write_bytes(PNG[:-200])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        read_image(tmp_path / "good.png", DecodeOptions())
        with pytest.raises(ValueError, match=r"truncated|broken"):
            read_image(tmp_path / "bad.png", DecodeOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "whit"}, "background must be a colour"),
        ({"background": "#11223344"}, "background must be a colour"),
        ({"value_range": (1, 0)}, "lower one first"),
        ({"value_range": (0, float("inf"))}, "two numbers"),
        ({"resolution": (0, 8)}, "both positive"),
        ({"channels": 0}, "at least 1"),
        ({"array_layout": "CWH"}, "HWC, CHW"),
    ],
)
def test_formats_without_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeOptions(**options)


# ---------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("array", "value_range", "expected"),
    [
        (np.array([0, 7, 255], np.uint8), None, [0, 7, 255]),
        (np.array([False, True]), None, [0, 255]),
        (np.array([0, 0.2, 1], np.float32), (0, 1), [0, 51, 255]),
        (np.array([-1, 0.2, 1], np.float64), (-1, 1), [0, 153, 255]),
        (np.array([0, 7.4, 255], np.float16), (0, 255), [0, 7, 255]),
        (np.array([0, 257, 65535], np.uint16), (0, 65535), [0, 1, 255]),
        (np.array([0, 7, 255], np.int64), (0, 255), [0, 7, 255]),
        (np.array([0, 1], np.uint8), (0, 1), [0, 255]),
        (np.array([0, 0.2, 1], ">f4"), (0, 1), [0, 51, 255]),
        (np.array([-0.001, 1.001]), (0, 1), [0, 255]),  # rounding, not clipping
    ],
)
def test_values_of_arrays(array, value_range, expected):
    options = DecodeOptions(channels=1, value_range=value_range)
    assert read_array(array[None, None], options)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "value_range", "message"),
    [
        (np.array([0.5]), None, r"float64 values have no range.*value_range=\(0, 1\)"),
        (np.array([5], np.uint16), None, "uint16 values have no range"),
        (np.array([0.5, -1]), (0, 1), "the value -1.0 is outside the range 0 to 1"),
        (np.array([3, 200], np.uint8), (0, 1), "the value 3 is outside"),
        (np.array([0.5, np.nan]), (0, 1), "the value nan"),
        (np.array([np.inf]), (0, 1), "the value inf"),
    ],
)
def test_values_that_are_refused(values, value_range, message):
    with pytest.raises(ValueError, match=message):
        read_array(values[None, None], DecodeOptions(channels=1, value_range=value_range))


def test_every_level_comes_back_from_the_models_range():
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(scale_to_uint8((levels / 127.5 - 1).astype(np.float32), (-1, 1)), levels)


def test_an_array_of_five_channels_is_cropped_and_resized_like_a_picture():
    planes = np.random.default_rng(2).integers(0, 256, (5, 12, 18)).astype(np.uint8)
    for seed in (None, 3):
        small = read_array(planes, DecodeOptions(channels=5, resolution=(6, 6)), seed)
        for plane, result in zip(planes, small, strict=True):
            assert np.array_equal(read_image(Image.fromarray(plane), DecodeOptions(1, (6, 6)), seed)[0], result)


def axes(*shape):
    """An array whose values differ, and the same as `[N, C, H, W]` by name of the axes."""
    return np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)


@pytest.mark.parametrize(
    ("array", "channels", "expected"),
    [
        (axes(4, 5), 1, lambda a: a[None, None]),
        (axes(4, 5, 1), 1, lambda a: a[None, None, :, :, 0]),
        (axes(1, 4, 5), 1, lambda a: a[None]),
        (axes(6, 4, 5), 1, lambda a: a[:, None]),
        (axes(4, 5, 3), 3, lambda a: a.transpose(2, 0, 1)[None]),
        (axes(3, 4, 5), 3, lambda a: a[None]),
        (axes(2, 4, 5, 3), 3, lambda a: a.transpose(0, 3, 1, 2)),
        (axes(2, 3, 4, 5), 3, lambda a: a),
        (axes(2, 7, 4, 5), 7, lambda a: a),
        (np.asfortranarray(axes(2, 4, 5, 3)), 3, lambda a: a.transpose(0, 3, 1, 2)),
    ],
    ids=["HW", "HW1", "1HW", "NHW", "HWC", "CHW", "NHWC", "NCHW", "7 channels", "Fortran"],
)
def test_axes_of_arrays(array, channels, expected, tmp_path):
    np.save(tmp_path / "a.npy", array)
    images, labels = open_arrays(tmp_path / "a.npy", DecodeOptions(channels=channels))
    assert np.array_equal(images, expected(array))
    assert labels is None
    assert isinstance(images, np.memmap)  # not read until needed


def test_a_shape_that_fits_both_layouts(tmp_path):
    array = axes(3, 4, 3)
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="array_layout='CHW' or HWC"):
        open_arrays(tmp_path / "a.npy", DecodeOptions())
    images, _ = open_arrays(tmp_path / "a.npy", DecodeOptions(array_layout="CHW"))
    assert np.array_equal(images[0], array)
    images, _ = open_arrays(tmp_path / "a.npy", DecodeOptions(array_layout="HWC"))
    assert np.array_equal(images[0], array.transpose(2, 0, 1))


def test_npz_files(tmp_path):
    images, labels = axes(3, 4, 5, 1), np.array([2, 0, 1])
    options = DecodeOptions(channels=1)
    np.savez(tmp_path / "positions.npz", images, labels)  # arr_0, arr_1
    np.savez_compressed(tmp_path / "names.npz", labels=labels, images=images, other=labels)
    np.savez(tmp_path / "single.npz", x=images)
    for name, has_labels in (("positions", True), ("names", True), ("single", False)):
        got, its_labels = open_arrays(tmp_path / f"{name}.npz", options)
        assert np.array_equal(got, images.transpose(0, 3, 1, 2))
        assert (its_labels is not None) == has_labels
        assert not has_labels or np.array_equal(its_labels, labels)


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "EOF: reading magic string, expected 8 bytes got 0"),
        ("a.npy", b"text, not numbers", "the magic string is not correct; expected .*, got b'text, '"),
        ("a.npy", b"\x93NUMPY\x01\x00\x76\x00", "."),
        ("a.npy", np.array([{"a": 1}, None], dtype=object), "Python objects"),
        ("a.npz", {"images": np.array([{"a": 1}], dtype=object)}, "pickle"),
        ("a.npy", np.zeros((2, 4, 4, 1), complex), "complex128, not numbers"),
        ("a.npy", np.array([["a"]]), "not numbers"),
        ("a.npy", np.zeros((0, 4, 4, 1), np.uint8), "holds no pixels"),
        ("a.npy", np.zeros((2, 4, 4, 3), np.uint8), r"\(2, 4, 4, 3\) does not fit in_channels=1"),
        ("a.npy", np.zeros(4, np.uint8), "does not fit"),
        ("a.npy", np.zeros((1, 2, 4, 4, 1), np.uint8), "does not fit"),
        ("a.npz", b"PK\x03\x04 and nothing more", "not a .npz file"),
        ("a.npz", b"anything else", "not a .npz file"),
        (
            "a.npz",
            {"x": np.zeros((2, 2)), "y": np.zeros((2, 2))},
            "arrays x, y; call the one with the images 'images'",
        ),
        ("a.npz", {"images": np.zeros((2, 4, 4)), "labels": np.zeros(3, int)}, r"shape \(2,\), got int64 \(3,\)"),
        ("a.npz", {"images": np.zeros((2, 4, 4)), "labels": np.zeros(2)}, "whole numbers"),
    ],
)
def test_array_files_that_are_refused(name, content, message, tmp_path):
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        open_arrays(tmp_path / name, DecodeOptions(channels=1))


def test_a_truncated_array_file(tmp_path):
    np.save(tmp_path / "a.npy", axes(2, 50, 50))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"mmap|size"):
        open_arrays(tmp_path / "a.npy", DecodeOptions(channels=1))


def test_flattened_images_are_not_taken_for_one_picture(tmp_path):
    np.save(tmp_path / "mnist.npy", np.zeros((100, 784), np.uint8))
    with pytest.raises(ValueError, match=r"\(100, 784\) does not fit"):
        open_arrays(tmp_path / "mnist.npy", DecodeOptions(channels=1), stack_only=True)


def test_32_bit_whole_numbers_have_the_range_that_is_stated(tmp_path):
    levels = np.array([[0, 100], [200, 255]], dtype=np.int32)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    plain = read_image(tmp_path / "a.tif", DecodeOptions(1))
    assert plain.tolist() == [[[0, 0], [1, 1]]]  # as 16-bit grey, level / 257
    stated = read_image(tmp_path / "a.tif", DecodeOptions(1, value_range=(0, 255)))
    assert stated.tolist() == [levels.tolist()]
