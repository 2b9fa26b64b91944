"""What is published of a model: the pipeline's files and the page that describes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .checkpointing import write_directory
from .evaluation import EvaluationReport
from .pipeline_ddpm import DDPMPipeline

_CARD = """---
{front_matter}
---

# {title}

{kind} image model: a DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) with {parameters:,}
parameters for {channels} x {height} x {width} images, trained on **{dataset}** with ddpm_hf.

{sample}

## Use

```python
from ddpm_hf import DDPMPipeline   # or: from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{title}")  # the path of this folder, or its name on the Hub
image = pipe(batch_size=1{labels}).images[0]
```

## Evaluation

{results}

## Training

{recipe}

## Limits

The model repeats the biases of its training images. Generated images can be used for deception; the paper names fraud,
crime and misinformation among the risks.

## Citation

```bibtex
@inproceedings{{ho2020ddpm,
  title     = {{Denoising Diffusion Probabilistic Models}},
  author    = {{Jonathan Ho and Ajay Jain and Pieter Abbeel}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year      = {{2020}}
}}
```
"""


def model_card(
    title: str,
    image_shape: tuple[int, int, int],
    parameters: int,
    dataset: str,
    recipe: dict[str, Any],
    report: EvaluationReport | None = None,
    sample: str | None = None,
    class_conditional: bool = False,
) -> ModelCard:
    """The README.md of a trained model.

    Args:
        title: The model's name.
        image_shape: Channels, height, width.
        parameters: How many weights.
        dataset: The training images' name.
        recipe: What to list under "Training".
        report: Numbers, for the page and the Hub's model index.
        sample: File name of a sample grid beside the card.
        class_conditional: Whether the network takes class labels.
    """
    results, lines = [], []
    if report is not None:
        for name, value in report.values.items():
            metric = f"{name} ({report.num_images} images of {report.split}, {report.settings[name]['estimator']})"
            lines.append(f"- {metric}: **{value['value']:.4f}** +- {value['standard_error']:.4f}")
            results.append(
                EvalResult(
                    task_type="unconditional-image-generation",
                    dataset_type=report.dataset,
                    dataset_name=report.dataset,
                    dataset_split=report.split,
                    metric_type=name,
                    metric_name=metric,
                    metric_value=round(value["value"], 4),
                )
            )
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion", "ddpm_hf"],
        model_name=title,
        eval_results=results or None,
    )
    channels, height, width = image_shape
    text = _CARD.format(
        kind="A class-conditional" if class_conditional else "An unconditional",
        labels=", class_labels=0" if class_conditional else "",
        front_matter=data.to_yaml(),
        title=title,
        parameters=parameters,
        channels=channels,
        height=height,
        width=width,
        dataset=dataset,
        sample=f"![samples]({sample})" if sample else "",
        results="\n".join(lines) or "None yet.",
        recipe="\n".join(f"- {key}: {value}" for key, value in recipe.items()),
    )
    return ModelCard(text)


def write_model_card(path: str | Path, *args: Any, **kwargs: Any) -> None:
    """`model_card` to a file."""
    model_card(*args, **kwargs).save(path)


def write_pipeline(pipe: DDPMPipeline, folder: Path) -> None:
    """Save a pipeline into a run's folder, beside its checkpoints.

    All of it is written and flushed elsewhere first; then each file and subfolder takes its predecessor's place.
    """
    staging = folder / ".pipeline"
    write_directory(staging, pipe.save_pretrained)
    for entry in sorted(staging.iterdir()):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    staging.rmdir()
