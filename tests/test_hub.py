"""The model card."""

from huggingface_hub import ModelCard

from ddpm_hf import EvaluationReport
from ddpm_hf.hub import write_model_card


def test_card_reads_back_with_its_numbers(tmp_path):
    report = EvaluationReport("digits", "validation", 296)
    report.values["bits_per_dim"] = {"value": 2.98768, "standard_error": 0.01, "sampling_standard_error": 0.002}
    report.settings["bits_per_dim"] = {"estimator": "full sum"}
    write_model_card(
        tmp_path / "README.md",
        title="my-model",
        image_shape=(1, 8, 8),
        parameters=1234567,
        dataset="digits",
        recipe={"updates": "10 of 64 images"},
        report=report,
        sample="samples.png",
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_dim", 2.9877)
    assert "296 images of validation" in result.metric_name
    for words in ("1,234,567", "samples.png", "updates: 10 of 64", "2.9877", "ho2020ddpm", "fraud"):
        assert words in card.text


def test_card_without_numbers(tmp_path):
    write_model_card(
        tmp_path / "README.md", title="m", image_shape=(3, 8, 8), parameters=1, dataset="x", recipe={"updates": 1}
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert "None yet." in card.text
