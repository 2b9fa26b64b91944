"""A model's weights in small files: bf16, in parts of at most 16 MiB, and back as a pipeline's folder.

python weight_parts.py pack MODEL PARTS     writes PARTS/part-000.bin, ..., parts.json, and this file beside them
python weight_parts.py unpack PARTS MODEL   writes a folder that diffusers' DDPMPipeline.from_pretrained opens

A part holds `VALUES` numbers: first their high bytes (sign and exponent), which compress to less than half, then
their low ones, each compressed by zlib. `unpack` needs torch and safetensors only, and checks every SHA-256. The
unpacked weights are float32 with the values that bf16 has, so the images differ a little from the packed model's.
"""

import hashlib
import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VALUES = 8_000_000  # in a part: 16 MB if nothing compresses
INDEX, WEIGHTS = "parts.json", "unet/diffusion_pytorch_model.safetensors"


def pack(model: Path, parts: Path) -> int:
    """Write a pipeline's weights, rounded to bf16, and its configuration as parts; return their bytes in all."""
    weights = load_file(model / WEIGHTS)
    if strangers := [name for name, value in weights.items() if not value.is_floating_point()]:
        raise ValueError(f"{strangers[0]} holds no floating point numbers")
    parts.mkdir(parents=True, exist_ok=True)
    flat = torch.cat([weights[name].to(torch.bfloat16).flatten() for name in sorted(weights)])
    files = []
    for i, values in enumerate(flat.split(VALUES)):
        low, high = values.view(torch.uint8).view(-1, 2).T.contiguous().numpy()  # little-endian
        planes = [zlib.compress(high.tobytes(), 6), zlib.compress(low.tobytes(), 1)]  # low bytes hardly compress
        name, content = f"part-{i:03d}.bin", b"".join(planes)
        (parts / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        files.append({"name": name, "values": len(values), "high_bytes": len(planes[0]), "sha256": sha256})
    configuration = {
        str(path.relative_to(model)): json.loads(path.read_text())
        for path in (model / "model_index.json", *model.glob("*/config.json"), *model.glob("*/scheduler_config.json"))
    }
    shapes = {name: list(weights[name].shape) for name in sorted(weights)}
    index = {"dtype": "bfloat16", "files": files, "shapes": shapes, "configuration": configuration}
    (parts / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    shutil.copyfile(__file__, parts / Path(__file__).name)
    return sum((parts / file["name"]).stat().st_size for file in files)


def unpack(parts: Path, model: Path) -> None:
    """Write the pipeline's folder that parts were made from; raise ValueError: a part is damaged, or files there."""
    if model.exists() and any(model.iterdir()):
        raise ValueError(f"{model} holds files already; name another folder")
    try:
        index = json.loads((parts / INDEX).read_text())
    except ValueError:
        raise ValueError(f"{parts / INDEX} is damaged: it is no JSON") from None
    flat = []
    for file in index["files"]:
        content = (parts / file["name"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise ValueError(f"{file['name']} is damaged: its SHA-256 is another one")
        planes = [zlib.decompress(part) for part in (content[: file["high_bytes"]], content[file["high_bytes"] :])]
        high, low = (torch.frombuffer(bytearray(plane), dtype=torch.uint8) for plane in planes)
        flat.append(torch.stack([low, high], 1).flatten().view(torch.bfloat16))
    sizes = [torch.Size(shape).numel() for shape in index["shapes"].values()]
    values = torch.cat(flat).float().split(sizes)
    weights = {
        name: x.reshape(shape).clone() for (name, shape), x in zip(index["shapes"].items(), values, strict=True)
    }
    for name, content in index["configuration"].items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("pack", "unpack"):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        {"pack": pack, "unpack": unpack}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
