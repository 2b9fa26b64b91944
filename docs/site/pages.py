"""What MkDocs cannot know by itself: the reference, made from docstrings and parsers, and links that leave docs/.

A link in a page is written as GitHub wants it, relative to the file. Where it leaves docs/, its target becomes part of
the site: a Markdown file as a page, anything else as a file to download, under `repository/`. What does not exist is
left as it is, and MkDocs' strict mode ends the build.
"""

import importlib
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import ddpm_hf
from ddpm_hf import cli

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "tests/fixtures/README.md")
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _default(action: Any) -> str:
    if action.required or not action.option_strings:
        return "*required*"
    value = action.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "" if value is None else f"`{value}`"


def commands_page() -> str:
    """Every flag of every command, by its groups."""
    lines = [
        "# Commands\n",
        "Made from the parsers themselves when this page was built. Where no default is given, the text says what is "
        "taken. `ddpm-hf COMMAND --help` prints the same.\n",
    ]
    for name in cli.COMMANDS:
        parser = cli.PARSERS[name](f"ddpm-hf {name}")
        lines += [f"## ddpm-hf {name}\n", f"{parser.description}\n"]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if "--help" not in action.option_strings]
            if not actions:
                continue
            title = (group.title or "").strip()
            if title not in ("options", "positional arguments", "optional arguments", "default"):
                lines.append(f"### {title} {{ #{name}-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')} }}\n")
            lines += ["| flag | default | what |", "|---|---|---|"]
            for action in actions:
                flags = ", ".join(f"`{s}`" for s in action.option_strings) or f"`{action.dest}`"
                lines.append(f"| {flags} | {_cell(_default(action))} | {_cell(action.help)} |")
            lines.append("")
    return "\n".join(lines)


def public_page() -> str:
    """Everything that `from ddpm_hf import ...` gives, and where it is described."""
    lines = ["# Public names\n", "All of these come from `ddpm_hf` itself: `from ddpm_hf import ...`.\n"]
    lines += ["| name | |", "|---|---|"]
    for name in ddpm_hf.__all__:
        if name.startswith("__"):
            continue
        value = getattr(ddpm_hf, name)
        module = getattr(value, "__module__", "")
        if module.startswith("ddpm_hf."):
            summary = (inspect.getdoc(value) or "").split("\n\n")[0]
        else:  # data has no docstring of its own
            module, summary = f"ddpm_hf.{ddpm_hf._WHERE[name]}", ""
        lines.append(f"| [`{name}`][{module}.{name}] | {_cell(summary)} |")
    return "\n".join(lines) + "\n"


def module_page(name: str) -> str:
    options = "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    return f"# ddpm_hf.{name}\n\n::: ddpm_hf.{name}\n{options}"


def modules() -> list[str]:
    """All modules with something in them, in the order of the packages in docs/design.md."""
    table = (ROOT / "docs/design.md").read_text()
    package = ROOT / "ddpm_hf"
    found = []
    for name in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE):
        files = sorted((package / name).glob("*.py")) if (package / name).is_dir() else [package / f"{name}.py"]
        found += [file for file in files if not file.stem.startswith("__")]
    return [".".join(file.relative_to(package).with_suffix("").parts) for file in found]


def on_config(config: Any) -> Any:
    reference = [
        {"Overview": "reference/index.md"},
        {"Public names": "reference/public.md"},
        {"Commands": "reference/commands.md"},
        {"Modules": [{name: f"reference/{name}.md"} for name in modules()]},
    ]
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = reference
    return config


def _reference_index() -> str:
    rows = []
    for name in modules():
        module = importlib.import_module(f"ddpm_hf.{name}")
        rows.append(f"| [`{name}`]({name}.md) | {_cell((module.__doc__ or '').strip().split(chr(10) * 2)[0])} |")
    return (
        "# Reference\n\n[Public names](public.md): the classes and functions of `ddpm_hf` itself. "
        "[Commands](commands.md): every flag. Below them, all modules from the ground up; what they may import "
        "is in [Design](../design.md).\n\n| module | |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def on_files(files: Any, config: Any) -> Any:
    generated = {
        "reference/index.md": _reference_index(),
        "reference/public.md": public_page(),
        "reference/commands.md": commands_page(),
        **{f"reference/{name}.md": module_page(name) for name in modules()},
        **{f"repository/{name}": (ROOT / name).read_text() for name in OUTSIDE},
    }
    # Flags and names in one piece, and room for tables and code of 119 columns.
    generated["site.css"] = "td:first-child code { white-space: nowrap; }\n.md-grid { max-width: 80rem; }\n"
    for path, text in generated.items():
        files.append(File.generated(config, path, content=text))
    wanted = {target for page in files.documentation_pages() for target in _leaving(page)}
    for target in sorted(wanted - set(OUTSIDE)):
        files.append(File.generated(config, f"repository/{target}", content=(ROOT / target).read_bytes()))
    return files


def _source(page: File) -> str | None:
    """Where a page lies in the repository; None for what is generated from nothing there."""
    path = page.src_uri
    if path.startswith("reference/"):
        return None
    return path.removeprefix("repository/") if path.startswith("repository/") else f"docs/{path}"


def _target(source: str, link: str) -> str | None:
    """The file of the repository that a link means, if it means one that is there."""
    if re.match(r"[a-z]+:", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _leaving(page: File) -> set[str]:
    source = _source(page)
    if source is None:
        return set()
    targets = {_target(source, match[1]) for match in _links(page.content_string)}
    return {target for target in targets if target is not None and not target.startswith("docs/")}


def _links(text: str) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in _LINK.finditer(text)]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = _source(page.file)
    if source is None:
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        target = _target(source, match[2])
        if target is None:
            return match[0]
        place = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        return match[1] + posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".") + match[3]

    return _LINK.sub(rewritten, markdown)
