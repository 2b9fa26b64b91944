"""A random Inception network in torch-fidelity's shape, whose own weights cannot be downloaded where tests run."""

from pathlib import Path

import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity


def save_random_inception(file: Path) -> None:
    """Weights of the right names and shapes, large enough that the features do not fade from layer to layer."""
    network = fidelity.FeatureExtractorInceptionV3
    whole, download = network.__dict__.get("load_state_dict"), fidelity.load_state_dict_from_url
    fidelity.load_state_dict_from_url = lambda *_, **__: {}
    network.load_state_dict = lambda self, state: None
    try:
        torch.manual_seed(0)
        net = network("inception-v3-compat", ["2048"], verbose=False)
    finally:
        fidelity.load_state_dict_from_url = download
        if whole is None:
            del network.load_state_dict
    for name, weight in net.state_dict().items():
        if name.endswith("conv.weight"):
            weight.mul_(6**0.5)
    torch.save(net.state_dict(), file)
