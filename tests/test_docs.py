"""Every block of code of README.md, docs/ and the notebook runs, made small; the site builds, whole and offline."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import doc_blocks
import pytest
from doc_blocks import Block, blocks, commands, pages, run_block

import ddpm_hf
from ddpm_hf import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What became of every block, from one process of their own."""
    output = tmp_path_factory.mktemp("docs") / "results.json"
    command = [sys.executable, str(ROOT / "tests" / "doc_blocks.py"), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_runs(results, page):
    there = blocks(page)
    seen = [result for result in results if result["page"] == page]
    assert {block.line for block in there} == {result["line"] for result in seen}
    failed = [f"{page}:{result['line']}: {result['error']}" for result in seen if result["outcome"] == "failed"]
    assert not failed, "\n".join(failed)
    for block in there:  # as many commands as there are to a reader
        if block.language == "bash":
            done = [result["what"] for result in seen if result["line"] == block.line]
            assert done == commands(block.text)


def test_most_blocks_run_and_the_list_of_those_that_do_not_is_used(results):
    by_outcome = {kind: sum(result["outcome"].startswith(kind) for result in results) for kind in ("run", "not run")}
    assert by_outcome["run"] > 5 * by_outcome["not run"]
    said = {result["outcome"] for result in results}
    reasons = {reason for reason, _ in doc_blocks.NOT_RUN.values()} | set(doc_blocks.BLOCKS_NOT_RUN.values())
    assert {reason for reason in reasons if f"not run: {reason}" not in said} == set()


def test_what_makes_commands_smaller_is_used():
    bash = "\n".join(command for page in pages() for b in blocks(page) for command in commands_of(b))
    python = "\n".join(b.text for page in pages() for b in blocks(page) if b.language == "python")
    assert [name for name in doc_blocks.SMALLER if not re.search(rf"ddpm-hf {name}|cli {name}", bash)] == []
    assert [flag for flag in doc_blocks.SMALLER_IF_GIVEN if flag not in bash] == ["--save_images_steps"]  # in YAML
    assert [text for text in doc_blocks.SMALLER_PYTHON if text not in python] == []


def commands_of(block: Block) -> list[str]:
    return commands(block.text) if block.language == "bash" else []


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("bash", "curl example.org", "neither run nor in NOT_RUN"),
        ("bash", "make dmeo", "no target dmeo"),
        ("bash", "ddpm-hf convert --form diffusers --checkpoint a --output b", "unknown flag form"),
        ("bash", "DDPM_HF_SPACE_MODELS=x python examples/space/ap.py", "no file examples/space/ap.py"),
        ("python", "1 +", "invalid syntax"),
        ("yaml", "preset: digits", "'# NAME.yaml'"),
        ("", "something", "blocks are python"),
    ],
)
def test_a_wrong_block_fails(language, text, words):
    with pytest.raises((ValueError, RuntimeError, SyntaxError), match=re.escape(words)):
        run_block(Block("docs/x.md", 1, language, text), {})


def test_a_block_that_is_not_closed_fails(tmp_path, monkeypatch):
    (tmp_path / "x.md").write_text("```bash\nls\n")
    monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="not closed"):
        blocks("x.md")


def test_comments_and_continued_lines():
    text = "# a comment\nddpm-hf sample --model 'a b' \\\n    --seeds 0-3   # another\n\nmake demo"
    assert commands(text) == ["ddpm-hf sample --model 'a b' --seeds 0-3", "make demo"]


def test_the_notebook_holds_no_output_and_no_path():
    for path in (ROOT / "examples").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
        for cell in notebook["cells"]:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None
        assert not re.search(r'"/(home|root|work|tmp|Users)/', path.read_text())


# Files of examples/ that other tests open, by where they are.
OPENED_BY = {"configs": "cli/test_cli.py", "accelerate": "cli/test_cli.py", "space": "hub/test_space.py"}


def test_every_example_is_exercised(results):
    ran = " ".join(result["what"] for result in results if result["outcome"] == "run") + " ".join(pages())
    ran += (ROOT / "Makefile").read_text()  # what `make demo` runs; .ci/run runs that
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        name = path.relative_to(ROOT).as_posix()
        folder = path.relative_to(ROOT / "examples").parts[0]
        if folder in OPENED_BY:
            assert f'"{folder}"' in (ROOT / "tests" / OPENED_BY[folder]).read_text()
        else:
            assert name in ran, f"nothing runs {name}"


def test_tests_that_pages_name_exist():
    pages_text = "".join((ROOT / page).read_text() for page in pages() if page.endswith(".md"))
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"\btest_\w+(?:\.py)?", pages_text))
    assert len(named) > 25
    for name in named:
        assert any((ROOT / "tests").rglob(name)) if name.endswith(".py") else f"def {name}(" in code, name


# ---------------------------------------------------------------- the site


class Resources(HTMLParser):
    """What a browser would load for a page, and the ids on it."""

    def __init__(self):
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.add(values["id"])
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(values["href"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, tuple[str, Resources]]:
    """The site as `make docs` builds it: page to (HTML, what is in it)."""
    folder = tmp_path_factory.mktemp("site")
    made = re.search(r"^docs:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    command = [*made.split("mkdocs ")[1].split(), "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    found = {}
    for path in folder.rglob("*.html"):
        found[path.relative_to(folder).as_posix()] = path.read_text(), Resources()
    for text, parsed in found.values():
        parsed.feed(text)
    assert (folder / "repository/examples/first_model.ipynb").is_file()
    assert not (folder / "site").exists()
    return found


def test_pages_load_nothing_from_elsewhere(site):
    assert len(site) > 60
    for name, (_, parsed) in site.items():
        assert [url for url in parsed.loaded if re.match(r"(https?:)?//", url)] == [], name


def test_links_on_pages_lead_somewhere(site):
    """mkdocs looks at the links of Markdown; this one at those of all pages, with anchors."""
    for name, (_, parsed) in site.items():
        for link in parsed.links:
            if re.match(r"[a-z]+:|//|/", link):
                continue
            place, _, anchor = link.partition("#")
            target = os.path.normpath(os.path.join(os.path.dirname(name), place)) if place else name
            if target in site and anchor not in ("", "__codelineno-0-1"):
                assert anchor in site[target][1].ids or anchor.startswith("__code"), f"{name} links to {link}"
            elif target.endswith(".html"):
                assert target in site, f"{name} links to {link}"


def test_the_reference_has_every_public_name_and_every_flag(site):
    public, commands_page = site["reference/public.html"][0], site["reference/commands.html"][0]
    for name in set(ddpm_hf.__all__) - {"__version__"}:
        assert f"<code>{name}</code>" in public
    for name in cli.COMMANDS:
        assert f"ddpm-hf {name}" in commands_page
        for action in cli.PARSERS[name](name)._actions:
            if "--help" not in action.option_strings:
                assert all(f"<code>{flag}</code>" in commands_page for flag in action.option_strings)
    for flag in ("--learning_rate", "--num_inference_steps", "--hub_private_repo", "--best_metric", "--features"):
        assert f"<code>{flag}</code>" in commands_page
    for path in (ROOT / "ddpm_hf").rglob("*.py"):
        if not path.stem.startswith("__"):
            name = ".".join(path.relative_to(ROOT / "ddpm_hf").with_suffix("").parts)
            assert f"reference/{name}.html" in site, "docs/design.md lists every package"
    scheduler = site["reference/diffusion.scheduling_ddpm.html"][0]
    for words in ("q_posterior", "Raises", "num_train_timesteps"):
        assert words in scheduler
