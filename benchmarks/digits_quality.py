"""How good are the digits? `python benchmarks/digits_quality.py runs/digits`

Draws 512 samples (DDIM, 100 steps) and compares them with the real images in two ways that need no network download:

- the mean confidence of a support-vector classifier (RBF) trained on the real digits, and the classes that it sees;
- the Frechet distance of pixel means and covariances (levels 0..16), beside the distance between two disjoint random
  sets of 512 real images, which perfect samples would have on average.
"""

import argparse
import json
import time

import numpy as np
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from ddpm_hf import DDPMPipeline
from ddpm_hf.sampling.generation import generate, with_sampler


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between Gaussians fitted to the rows of `a` and `b`."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=3, help="how many sets of samples")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--output", help="write the numbers as JSON here")
    arguments = parser.parse_args()

    real, labels = load_digits(return_X_y=True)
    classifier = SVC(probability=True, random_state=0).fit(real, labels)
    draw = np.random.default_rng(0)
    shuffled = [draw.permutation(len(real)) for _ in range(20)]
    between_real = [frechet_distance(real[order[:512]], real[order[512:1024]]) for order in shuffled]

    pipe = with_sampler(DDPMPipeline.from_pretrained(arguments.model), "ddim")
    rows = []
    for run in range(arguments.seeds):
        seeds = range(512 * run, 512 * (run + 1))
        started = time.monotonic()
        batches = generate(pipe, seeds, batch_size=128, num_inference_steps=arguments.num_inference_steps)
        samples = torch.cat([images for _, images in batches])[:, 0].numpy().reshape(512, 64) * (16 / 255)
        probabilities = classifier.predict_proba(samples)
        rows.append(
            {
                "seconds": time.monotonic() - started,
                "confidence": probabilities.max(1).mean(),
                "classes": len(np.unique(probabilities.argmax(1))),
                "frechet_all_real": frechet_distance(samples, real),
                "frechet_512_real": float(np.mean([frechet_distance(samples, real[o[:512]]) for o in shuffled])),
            }
        )
        print(", ".join(f"{key} {value:.3f}" for key, value in rows[-1].items()))
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    mean["between_real_sets"] = float(np.mean(between_real))
    mean["ratio_512"] = mean["frechet_512_real"] / mean["between_real_sets"]
    mean["ratio_all"] = mean["frechet_all_real"] / mean["between_real_sets"]
    print("mean: " + ", ".join(f"{key} {value:.3f}" for key, value in mean.items()))
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({"mean": mean, "runs": rows}, file, indent=2)


if __name__ == "__main__":
    main()
