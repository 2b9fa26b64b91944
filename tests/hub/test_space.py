"""A Space for a model: what is written and pushed, and the app as a visitor's program sees it."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import DIGITS_MODEL
from hub.server import Fault, HubServer
from huggingface_hub import constants
from programs import run_program

from ddpm_hf import cli
from ddpm_hf.hub import publish
from ddpm_hf.hub.space import GRADIO, space_texts, write_space

ROOT = Path(__file__).parents[2]
MODEL = DIGITS_MODEL
TOKEN = "hf_test_token"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """What a training run leaves."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    shutil.copytree(MODEL, folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# digits\n")
    (folder / "checkpoint-10").mkdir()
    for private in ("checkpoint-10/optimizer.safetensors", "training_config.yaml", ".hub.json"):
        (folder / private).write_text("x")
    return folder


@pytest.fixture(scope="module")
def space(run_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spaces") / "demo"
    write_space(run_folder, folder)
    return folder


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


# ---------------------------------------------------------------- what is written


def test_the_example_is_what_the_command_writes():
    made = space_texts("runs/digits", "DDPM: digits", "apache-2.0")
    assert {path.name for path in (ROOT / "examples" / "space").iterdir() if path.is_file()} == set(made)
    for name in ("app.py", "README.md"):
        assert (ROOT / "examples" / "space" / name).read_text() == made[name], f"write examples/space/{name} again"


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def parsed(lines: list[str]) -> dict[str, set[str]]:
        found = [re.fullmatch(r"([\w-]+)(.*)", line.strip()) for line in lines]
        return {match[1].replace("-", "_"): set(match[2].split(",")) for match in found}

    example = (ROOT / "examples" / "space" / "requirements.txt").read_text().splitlines()
    assert parsed(example) == parsed(project["dependencies"])


def test_a_space_is_whole(space, run_folder):
    files = {path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file()}
    sources = (path for path in (ROOT / "ddpm_hf").rglob("*") if path.suffix in (".py", ".md"))
    package = {path.relative_to(ROOT).as_posix() for path in sources}
    model = {"model/README.md", "model/model_index.json", "model/scheduler/scheduler_config.json"} | {
        "model/unet/config.json",
        "model/unet/diffusion_pytorch_model.safetensors",
    }
    assert {"app.py", "README.md", "requirements.txt", "ddpm_hf/LICENSE"} | package | model == files
    assert (space / "ddpm_hf" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    for name in model:
        assert (space / name).read_bytes() == (run_folder / name.removeprefix("model/")).read_bytes()
    front = front_matter((space / "README.md").read_text())
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "cc-by-4.0")
    assert f"gradio=={front['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert front["sdk_version"] == GRADIO
    assert space.stat().st_mode & 0o755 == 0o755
    assert [path.name for path in space.parent.iterdir()] == ["demo"], "something was left behind"


def test_a_model_by_name_is_not_copied(run_folder, tmp_path):
    write_space(run_folder, tmp_path / "demo", model_id="org/digits", license="mit")
    assert not (tmp_path / "demo" / "model").exists()
    assert '"org/digits"' in (tmp_path / "demo" / "app.py").read_text()
    front = front_matter((tmp_path / "demo" / "README.md").read_text())
    assert (front["models"], front["license"]) == (["org/digits"], "mit")


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (b"---\r\nlicense: mit\r\n---\r\n\r\n# digits\r\n", "mit"),
        (b"---\ntitle: a---\nlicense: mit\n---\n", "mit"),
        (b"---\nlicense: mit\n---", "mit"),
        (b"---\nlicense: [mit\n---\n", None),
        (b"# digits\n", None),
    ],
)
def test_the_license_is_what_the_card_says(run_folder, tmp_path, card, license):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_bytes(card)
    write_space(tmp_path / "run", tmp_path / "demo", model_id="org/digits")
    assert front_matter((tmp_path / "demo" / "README.md").read_text()).get("license") == license


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN"], "give --repo_id org/name to push the Space, or --output FOLDER"),
        (["nowhere", "--output", "NEW"], "there is no folder 'nowhere'"),
        (["nowhere", "--repo_id", "org/demo"], "there is no folder 'nowhere'"),
        (["EMPTY", "--output", "NEW"], "holds no pipeline"),
        (["RUN", "--output", "FULL"], "holds something else; name a new folder"),
        (["RUN", "--output", "NEW", "--model_id", "a/b/c"], "'a/b/c' is no repository name"),
        (["RUN", "--output", "NEW", "--license", "Do What You Want"], "license"),
        (["RUN", "--repo_id", "a/b/c"], "'a/b/c' is no repository name"),
        (["RUN", "--repo_id", "org/demo", "--token", "x"], "nothing can be pushed while HF_HUB_OFFLINE is set"),
        (["RUN", "--repoid", "org/demo"], "unknown flag --repoid (did you mean '--repo_id'?)"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, run_folder, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "mine.txt").write_text("mine")
    places = {"RUN": str(run_folder)} | {name: str(tmp_path / name) for name in ("EMPTY", "FULL", "NEW")}
    assert cli.main(["space", *(places.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "FULL"], "something was left behind"
    assert [path.name for path in (tmp_path / "FULL").iterdir()] == ["mine.txt"]


def test_a_text_with_a_token_is_refused(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("see hf_" + "a" * 34)
    with pytest.raises(ValueError, match="holds an access token"):
        write_space(tmp_path / "run", tmp_path / "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- what is pushed


PUSH_ALL = """
import json, sys
from ddpm_hf import cli
from ddpm_hf.hub import publish
print(json.dumps([cli.main(["space", *arguments]) for arguments in json.load(sys.stdin)]))
"""


def push_all(hub: HubServer, home: Path, *commands: list[str]) -> tuple[list[int], str, str]:
    """`ddpm-hf space` commands, one after the other in one process: exit codes, what they printed, their errors."""
    program = home.parent / "push_all.py"
    program.write_text(PUSH_ALL)
    done = run_program(program, environment=hub.environment(home, TOKEN), input=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    *lines, codes = done.stdout.strip().splitlines()
    return json.loads(codes), "\n".join(lines), done.stderr


def test_a_space_is_pushed_and_renewed(run_folder, space, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        hub.faults.append(Fault("POST /api/spaces/.*/commit/", status=503))
        codes, out, _ = push_all(hub, tmp_path / "home", [str(run_folder), "--repo_id", "tester/demo"])
        assert codes == [0]
        assert "trying again" in out
        assert out.splitlines()[-1] == f"{hub.url}/spaces/tester/demo"
        assert hub.info("spaces", "tester/demo")["private"] is True
        assert len(hub.commits("spaces", "tester/demo")) == 2  # what the Hub makes by itself, and one
        written = {path.relative_to(space).as_posix(): path for path in space.rglob("*") if path.is_file()}
        assert set(hub.files("spaces", "tester/demo")) == {".gitattributes", *written}
        for name, path in written.items():
            assert hub.read("spaces", "tester/demo", name) == path.read_bytes()

        # A module and weights that are there no more go away; what a person added stays. Without a namespace it is the
        # same repository.
        added = {"ddpm_hf/old.py": b"", "model/unet/old.safetensors": b"", "notes.md": b"mine"}
        hub.commit("spaces", "tester/demo", "by hand", added)
        again = [str(run_folder), "--repo_id", "demo"]
        codes, out, _ = push_all(hub, tmp_path / "home", again, again)
        assert codes == [0, 0]
        assert set(hub.files("spaces", "tester/demo")) == {".gitattributes", "notes.md", *written}
        assert out.count("already has all of it") == 1


def test_a_push_that_may_not_be_is_refused(run_folder, tmp_path):
    run = str(run_folder)
    with HubServer(tmp_path / "hub") as hub:
        hub.create("spaces", "tester/public", private=False)
        hub.create("spaces", "tester/chat", private=True)
        hub.commit("spaces", "tester/chat", "another app", {"app.py": b"import gradio"})
        hub.create("spaces", "tester/readonly", private=True)
        hub.change("spaces", "tester/readonly", read_only=True)
        before = {name: hub.commits("spaces", f"tester/{name}") for name in ("public", "chat", "readonly")}
        commands = [[run, "--repo_id", f"tester/{name}"] for name in before]
        codes, out, errors = push_all(hub, tmp_path / "home", *commands, [*commands[0], "--private", "false"])
        assert codes == [2, 2, 2, 0]
        public, chat, readonly = errors.splitlines()
        assert "tester/public is public; add --private false" in public
        assert "tester/chat is another Space, which a push would overwrite" in chat
        assert re.search("(may not write to|answered 403 for) 'tester/readonly'", readonly)
        after = {name: hub.commits("spaces", f"tester/{name}") for name in before}
        assert len(after.pop("public")) == len(before.pop("public")) + 1  # by the last command only
        assert after == before
        assert "(public)" in out
        assert "app.py" in hub.files("spaces", "tester/public")


def test_a_push_without_a_token_is_refused(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(publish, "get_token", lambda: None)
    assert cli.main(["space", str(run_folder), "--repo_id", "tester/new"]) == 2
    assert "pushing needs a token with write access" in capsys.readouterr().err
