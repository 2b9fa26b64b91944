"""The model card (README.md): what it says, and how it is renewed without touching what a person wrote.

What is generated stands between two HTML comments, which the Hub does not show:

    <!-- ddpm_hf:evaluation 1f3a9c02 -->
    ...
    <!-- /ddpm_hf:evaluation -->

The eight digits are a hash of the text between them. Renewing a card replaces a section only where the hash still
fits, so a section that a person has edited stays as it is; so does everything outside the sections, and a section that
a person has removed stays away. In the front matter a person's keys stay and ours are added.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..utils.errors import UserError
from ..utils.text import number, public_name

_SECTION = re.compile(r"<!-- ddpm_hf:(\w+) (\w{8}) -->\n(.*?)<!-- /ddpm_hf:\1 -->", re.DOTALL)
_FRONT = re.compile(r"\A---\n(.*?\n)?---(?:\n|\Z)", re.DOTALL)
WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

_HEADINGS = {
    "summary": "",
    "samples": "## Samples",
    "use": "## Use",
    "evaluation": "## Evaluation",
    "training": "## Training",
    "limits": "## Intended use and limits",
    "license": "## License",
    "citation": "## Citation",
}

_LIMITS = """\
Intended for research and teaching on generative models, and for comparing against the paper. It was not made for
decisions about people, nor to stand in for photographs as evidence.

The model repeats the biases of its training images, in what it shows and in what it leaves out; it may also repeat
single images. Generated images can be used to deceive: the paper names fraud, crime and misinformation among the
risks."""

_CITATION = """\
```bibtex
@inproceedings{ho2020ddpm,
  title     = {Denoising Diffusion Probabilistic Models},
  author    = {Jonathan Ho and Ajay Jain and Pieter Abbeel},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}
```"""

# A report's names begin with these; the Hub knows the type, people read the name.
_METRICS = {
    "bits_per_dim": ("bits_per_dim", "bits/dim"),
    "fid": ("fid", "FID"),
    "fd": ("frechet_distance", "Frechet distance"),
    "kid": ("kid", "KID"),
    "kd": ("kernel_distance", "kernel distance"),
    "is": ("inception_score", "Inception Score"),
}


@dataclass(frozen=True)
class ModelFacts:
    """What a pipeline's folder says of its model.

    Attributes:
        image_shape: Channels, height, width.
        parameters: How many weights.
        num_train_timesteps: T.
        prediction_type: As the scheduler's configuration has it.
        classes: How many classes the network takes, or `None`.
        first_class: What its first class is called, or 0: for the example.
    """

    image_shape: tuple[int, int, int]
    parameters: int
    num_train_timesteps: int
    prediction_type: str
    classes: int | None
    first_class: str | int = 0

    @classmethod
    def read(cls, folder: Path) -> ModelFacts:
        """From configurations and the headers of the weights; no weights are loaded.

        Raises:
            OSError, KeyError: The folder is not a saved DDPM.
        """
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        size = unet["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        weights = [path for path in sorted((folder / "unet").iterdir()) if WEIGHTS.fullmatch(path.name)]
        return cls(
            (unet["in_channels"], height, width),
            sum(_count_weights(path) for path in weights),
            scheduler["num_train_timesteps"],
            scheduler.get("prediction_type", "epsilon"),
            unet.get("num_class_embeds"),
            (unet.get("_class_names") or [0])[0],
        )


def _count_weights(path: Path) -> int:
    """How many numbers a safetensors file holds: an 8-byte length, then JSON with every tensor's shape."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


@dataclass
class CardFacts:
    """What else a card says.

    Attributes:
        name: What `from_pretrained` is called with: a repository's name, or a folder's.
        dataset: The training images' name.
        dataset_id: Their name on the Hub, where they are there.
        recipe: What to list under "Training".
        report: An `EvaluationReport` as plain values, for the page and the Hub's model index.
        sample: File name of a sample grid beside the card.
        license: An identifier as the Hub knows it, such as `apache-2.0`.
    """

    name: str
    dataset: str | None = None
    dataset_id: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    sample: str | None = None
    license: str | None = None


def check_license(license: str | None) -> None:
    """A license is given by its identifier.

    Raises:
        ValueError: It is something else.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise UserError(
            f"--license {license!r} is no license identifier; write it like apache-2.0, mit, cc-by-4.0 or other"
        )


def make_card(model: ModelFacts, facts: CardFacts) -> str:
    """The text of a card, all of it generated."""
    check_license(facts.license)
    lines, results = _evaluation(facts)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=facts.license,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        tags=["ddpm", "diffusion", "ddpm_hf"],
        model_name=facts.name.split("/")[-1] if results else None,  # a name for the index only
        eval_results=results or None,
    )
    texts = {
        "summary": _summary(model, facts),
        "samples": f"![samples]({facts.sample})" if facts.sample else "No sample grid yet.",
        "use": _use(model, facts.name),
        "evaluation": "\n".join(lines) or "None yet.",
        "training": "\n".join(f"- {key}: {value}" for key, value in facts.recipe.items()) or "Not recorded.",
        "limits": _LIMITS,
        "license": facts.license or "None was stated. Ask the authors before using the model.",
        "citation": _CITATION,
    }
    body = [f"# {facts.name.split('/')[-1]}"]
    for name, text in texts.items():
        body += [_HEADINGS[name]] * bool(_HEADINGS[name]) + [_marked(name, text)]
    return f"---\n{_yaml(data.to_dict())}---\n\n" + "\n\n".join(body) + "\n"


def _yaml(front: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)


def _summary(model: ModelFacts, facts: CardFacts) -> str:
    channels, height, width = model.image_shape
    kind = "An unconditional" if model.classes is None else "A class-conditional"
    trained = f", trained on **{facts.dataset}**" if facts.dataset else ""
    return (
        f"{kind} image model: a DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) with {model.parameters:,}\n"
        f"parameters for {channels} x {height} x {width} images{trained}. Made with ddpm_hf; a diffusers repository."
    )


def _use(model: ModelFacts, name: str) -> str:
    """Both loading snippets; stock's only where stock samples the same."""
    steps = "" if model.num_train_timesteps == 1000 else f", num_inference_steps={model.num_train_timesteps}"
    labels = "" if model.classes is None else f", class_labels={model.first_class!r}"
    ours = _python("ddpm_hf", name, f"batch_size=4{labels}")
    if model.prediction_type not in ("epsilon", "sample", "v_prediction"):
        stock = f"Stock diffusers refuses to sample from it: its scheduler does not know `{model.prediction_type}`."
    else:
        stock = "With stock diffusers alone:\n\n" + _python("diffusers", name, f"batch_size=4{steps}")
        if model.classes is not None:
            stock += "\n\nStock's network takes `class_labels`, its pipeline does not pass any."
    return f"With ddpm_hf:\n\n{ours}\n\n{stock}"


def _python(package: str, name: str, arguments: str) -> str:
    return (
        f"```python\nfrom {package} import DDPMPipeline\n\n"
        f'pipe = DDPMPipeline.from_pretrained("{name}")\nimages = pipe({arguments}).images\n```'
    )


def _evaluation(facts: CardFacts) -> tuple[list[str], list[EvalResult]]:
    """Lines for the page, and the same for the Hub's model index; counts and features are part of a metric's name."""
    lines: list[str] = []
    results: list[EvalResult] = []
    report = facts.report or {}
    all_settings = report.get("settings") or {}
    dataset = public_name(str(report.get("dataset")))
    for key, entry in (report.get("values") or {}).items():
        settings, value = all_settings.get(key) or {}, entry.get("value")
        kind, title = next(
            (_METRICS[head] for head in _METRICS if key == head or key.startswith(f"{head}_")), (key, key)
        )
        # Numbers of samples say in their estimator how many there were, and of which features.
        split = settings.get("split", report.get("split"))
        images = [] if "num_samples" in settings else [f"{report.get('num_images')} images of {split}"]
        metric = f"{title} ({', '.join([*images, *filter(None, [settings.get('estimator')])])})"
        if not _is_number(value):
            continue
        error = entry.get("standard_error")
        text, _, error_text = number(value, error if _is_number(error) else math.nan).partition(" ± ")
        lines.append(f"- {metric}: **{text}**" + (f" ± {error_text}" if error_text else ""))
        results.append(
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type=kind,
                metric_name=metric,
                metric_value=float(f"{value:.5g}"),
            )
        )
    if lines:
        lines.insert(0, f"On {dataset}; ± is one standard error.\n")
        sampling = all_settings.get("sampling") or {}
        told = [f"{key} {sampling[key]}" for key in ("sampler", "num_inference_steps", "seed") if key in sampling]
        lines += [f"\nSamples were drawn with {', '.join(told)}."] if told else []
        lines += [f"\nBefore you compare: {warning}" for warning in report.get("warnings") or []]
    return lines, results


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:8]


def _marked(name: str, text: str) -> str:
    return f"<!-- ddpm_hf:{name} {_digest(text)} -->\n{text.strip()}\n<!-- /ddpm_hf:{name} -->"


def merge_cards(
    person: str, generated: str, only: Collection[str] = tuple(_HEADINGS), license: str | None = None
) -> tuple[str, list[str]]:
    """A card that may have been edited, with its generated sections renewed.

    Args:
        person: The card as it is.
        generated: The card as `make_card` writes it now.
        only: The sections to renew.
        license: Set this one, whatever the card says.

    Returns:
        The card, and the names of what was kept although it is generated: a person edited it.
    """
    front, body = _split(person)
    new_body = _split(generated)[1]
    sections = {found[1]: found[3] for found in _SECTION.finditer(new_body) if found[1] in only}
    kept: list[str] = []

    told = next((found[3] for found in _SECTION.finditer(body) if found[1] == "evaluation"), "")
    try:
        before = front_matter(person)
        after = _merge_front(before, front_matter(generated), told if "evaluation" in sections else None)
    except (AttributeError, KeyError, TypeError, ValueError):  # it is not what the Hub takes either
        kept.append("front matter")
    else:
        if license is not None:
            after["license"] = license
        if "license" in sections and isinstance(after.get("license"), str):
            sections["license"] = after["license"]
        if after != before:
            front = _yaml(after)

    def renewed(found: re.Match[str]) -> str:
        name, digest, text = found.groups()
        if name not in sections:
            return found[0]
        if _digest(text) != digest:
            kept.append(name)
            return found[0]
        return _marked(name, sections[name])

    body = _SECTION.sub(renewed, body) if body.strip() else new_body
    return f"---\n{front}---\n{body}", kept


def text_outside(card: str) -> str:
    """What of a card is not generated."""
    return _SECTION.sub(lambda found: f"[{found[1]}]", _split(card)[1]).strip()


def front_matter(card: str) -> dict[str, Any]:
    """The keys that stand above a card's text; empty where none do.

    Raises:
        ValueError: What stands there is not YAML, or no keys and values.
    """
    try:
        front = yaml.safe_load(_split(card)[0])
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UserError("the front matter of the card is not YAML") from error
    if not isinstance(front, (dict, NoneType)):
        raise UserError("the front matter of the card has no keys and values")
    return front or {}


def _split(card: str) -> tuple[str, str]:
    """Front matter (ending in a newline, or empty) and body."""
    card = card.replace("\r\n", "\n")
    found = _FRONT.match(card)
    return (found[1] or "", card[found.end() :]) if found else ("", "\n" + card)


def _merge_front(person: dict[str, Any], generated: dict[str, Any], told: str | None) -> dict[str, Any]:
    """A person's keys stay, missing ones are added, lists are joined.

    Results of the model index are ours, and replaced, where the page's old evaluation section (`told`) lists them or
    where there is a new one of the same metric, dataset and split. `None` leaves them all.
    """
    merged = dict(person)
    for key, value in generated.items():
        have = merged.get(key)
        if key == "model-index":
            continue
        if isinstance(value, list) and isinstance(have, (list, str)):
            have = [have] if isinstance(have, str) else have
            merged[key] = have + [item for item in value if item not in have]
        elif have is None:
            merged[key] = value
    if told is not None:
        index = (merged.get("model-index") or generated.get("model-index") or [{}])[0]
        new = (generated.get("model-index") or [{}])[0].get("results") or []
        replaced = set().union(*map(_measured, new))
        results = [
            result
            for result in index.get("results") or []
            if not _measured(result) & replaced
            and not any(f"- {metric.get('name')}: " in told for metric in result.get("metrics", []))
        ]
        merged.pop("model-index", None)
        if results + new:
            merged["model-index"] = [{**index, "results": results + new}]
    return merged


def _measured(result: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Dataset, split and kind of each metric of a result."""
    dataset = result.get("dataset", {})
    return {(dataset.get("name"), dataset.get("split"), metric.get("type")) for metric in result.get("metrics", [])}
