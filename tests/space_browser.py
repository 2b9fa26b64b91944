"""The Space in a real browser: click, wait, look. `make space-test`; needs Chromium, which pip cannot install.

    python tests/space_browser.py [--model FOLDER] [--screenshots FOLDER]

Fails where a picture does not appear, or where the page or the app tries to reach anything but this machine.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffusers import DDIMScheduler
from PIL import Image
from space_server import running

from ddpm_hf import DDPMPipeline

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "ddpm_hf" / "models" / "digits"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOW = (
    "error: there is no Chromium on this machine; install it (Debian, Ubuntu: apt-get install chromium) or put one of "
    f"{', '.join(NAMES)} on PATH"
)
_LOADED = "images => images.length >= %d && images.every(image => image.complete && image.naturalWidth > 0)"


def shown(page: Any, selector: str, count: int) -> None:
    """Wait until so many pictures are there, and are really pictures."""
    page.wait_for_function(
        f"selector => ({_LOADED % count})([...document.querySelectorAll(selector)])", arg=selector, timeout=60_000
    )


def visit(page: Any, url: str, files: Path, screenshots: Path) -> None:
    """Use the page as a visitor does; `screenshots` get space-sampling.png and space.png."""
    page.goto(url)
    page.get_by_text("608,689 parameters").wait_for()  # the app has told about its model

    # How long it will take is there before anything is pressed, and follows the fields.
    expected = page.locator("#expected").get_by_text(re.compile(r"Expected: [\d.]+ s \(measured"))
    expected.wait_for()
    before = float(re.search(r"Expected: ([\d.]+) s", expected.inner_text())[1])
    page.get_by_label("number input for Steps").fill("1000")
    page.wait_for_function(
        "before => parseFloat(document.querySelector('#expected').innerText.slice(10)) > before", arg=before
    )

    # Sampling can be watched: there is a picture of x_t while there is none in the gallery yet.
    page.get_by_label("Sampler").click()
    page.get_by_role("option", name="ddim", exact=True).click()
    page.get_by_label("Seeds").fill("0-7")
    page.get_by_label("number input for Steps").fill("400")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#timing").get_by_text(re.compile(r"step \d+ of 400")).wait_for()
    shown(page, "#x_t img", 1)
    page.locator("#timing").get_by_text(re.compile(r"step [23]\d\d of 400")).wait_for()
    page.screenshot(path=screenshots / "space-sampling.png")
    assert page.locator("#gallery img").count() == 0, "the images are there before they can be"
    page.locator("#timing").get_by_text(re.compile(r"8 drawn in .*: 400 steps of ddim, 400 network")).wait_for(
        timeout=60_000
    )
    shown(page, "#gallery img", 8)
    shown(page, "#x_0 img", 1)
    page.screenshot(path=screenshots / "space.png")

    # It can be stopped, and the next sampling is complete.
    page.get_by_label("Seeds").fill("0-15")
    page.get_by_label("number input for Steps").fill("1000")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#timing").get_by_text(re.compile(r"step \d+ of 1000")).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#timing").get_by_text("stopped").wait_for()
    assert page.locator("#gallery img").count() == 0, "it was not stopped before its end"
    page.get_by_label("Seeds").fill("3")
    page.get_by_label("number input for Steps").fill("20")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#timing").get_by_text(re.compile("1 drawn in .*: 20 steps of ddim")).wait_for()
    shown(page, "#gallery img", 1)

    # A mistake is told in a sentence.
    page.get_by_label("Seeds").fill("0-999")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("Seeds are too many; at most 16 images at a time").wait_for()

    page.get_by_label("number input for Steps").fill("50")
    page.get_by_role("tab", name="Interpolate").click()
    page.get_by_role("button", name="Interpolate").click()
    shown(page, "#figure img", 1)

    page.get_by_role("tab", name="Bits/dim").click()
    (files / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of the kind")
    Image.new("RGBA", (40, 30), (200, 30, 30, 128)).save(files / "rose.png")
    page.locator("#file input[type=file]").set_input_files(files / "broken.png")
    page.locator("#file").get_by_text("broken").first.wait_for()
    page.get_by_role("button", name="Bits per dimension").click()
    page.get_by_text(re.compile("not an image of a known format|cannot be read|broken PNG|truncated")).first.wait_for()
    page.locator("#file").get_by_label("Clear").click()
    page.locator("#file input[type=file]").set_input_files(files / "rose.png")
    page.locator("#file").get_by_text("rose").first.wait_for()
    page.get_by_role("button", name="Bits per dimension").click()
    page.locator("#bits").get_by_text(re.compile(r"[\d.]+ ± [\d.]+ bits/dim")).wait_for()
    shown(page, "#seen img", 1)

    # On a telephone nothing is cut off at the side.
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(url)
    page.locator("#expected").get_by_text("Expected: ").wait_for()
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#timing").get_by_text("8 drawn in").wait_for(timeout=60_000)
    shown(page, "#gallery img", 8)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "it is wider than the window"
    for picture in page.locator("#gallery img").all():
        box = picture.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 390, "a picture is cut off at the side"


def visit_student(page: Any, url: str) -> None:
    """Use the page of a distilled model, which has its own steps."""
    page.set_viewport_size({"width": 1280, "height": 940})
    page.goto(url)
    page.get_by_text("distilled into 4 steps").wait_for()
    steps = page.get_by_label("number input for Steps")
    assert (steps.input_value(), steps.is_disabled()) == ("4", True)
    page.get_by_role("button", name="Sample", exact=True).click()
    page.locator("#timing").get_by_text(re.compile("8 drawn in .*: 4 steps, 4 network")).wait_for()
    shown(page, "#gallery img", 8)
    for what in (page.get_by_label("Sampler"), page.get_by_role("tab", name="Bits/dim")):
        assert not what.is_visible(), "a distilled model has neither another sampler nor a likelihood"


def save_student(folder: Path) -> None:
    """Save what looks like a distilled model; its images do not matter."""
    pipe = DDPMPipeline.from_pretrained(MODEL)
    pipe.unet.register_to_config(_distilled_steps=4)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    DDPMPipeline(pipe.unet, scheduler).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--screenshots", type=Path, default=None, help="where to keep them; default: nowhere")
    flags = parser.parse_args()
    browser_path = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser_path is None:
        print(HOW, file=sys.stderr)
        return 1
    from playwright.sync_api import Error, sync_playwright

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = ROOT / "examples" / "space" / "app.py"
        save_student(folder / "student")
        with (
            running(program, folder / "app", flags.model.name, flags.model.parent) as app,
            running(program, folder / "of_student", "student", folder) as of_student,
            sync_playwright() as playwright,
        ):
            # No sandbox: it refuses to run for root, and nothing but this page is opened.
            arguments = ["--no-sandbox", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=browser_path, args=arguments)
            page = browser.new_page(viewport={"width": 1280, "height": 940})
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.set_default_timeout(30_000)
            try:
                visit(page, app.url, folder, flags.screenshots or folder)
                visit_student(page, of_student.url)
            except (Error, AssertionError) as error:
                page.screenshot(path="space-failure.png")
                print(f"error: {error}\nwhat was on the page: space-failure.png", file=sys.stderr)
                return 1
            browser.close()
            left = [url for url in asked if urlsplit(url).scheme != "data" and urlsplit(url).hostname != "127.0.0.1"]
            left = (
                [url for url in left if not url.startswith("blob:http://127.0.0.1")] + app.left() + of_student.left()
            )
    if left:
        print(f"error: asked for from elsewhere: {', '.join(sorted(set(left)))}", file=sys.stderr)
        return 1
    print(f"all is shown; {len(asked)} requests, none left this machine")
    return 0


if __name__ == "__main__":
    sys.exit(main())
