"""What stock diffusers does, to measure against: its sampling loop, and the update and data of its training example.

The training computes what diffusers' `examples/unconditional_image_generation/train_unconditional.py` does: AdamW,
clipped gradients, EMA, float32, images through torchvision's transforms, and the loss read after every update.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torchvision import transforms


def transform(size: int, channels: int) -> transforms.Compose:
    """The example's, for pictures of any mode."""
    return transforms.Compose(
        [
            transforms.Lambda(lambda image: image.convert("RGB" if channels == 3 else "L")),
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip() if channels == 3 else transforms.Lambda(lambda image: image),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


class StockTraining:
    """The example's loop body."""

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        learning_rate: float = 1e-4,
        warmup: int = 500,
        autocast: torch.dtype | None = None,
    ):
        self.unet, self.scheduler, self.autocast = unet.train(), scheduler, autocast
        self.model = unet  # or compiled
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, betas=(0.95, 0.999), weight_decay=1e-6)
        self.lr = get_scheduler("constant_with_warmup", self.optimizer, num_warmup_steps=warmup)
        self.ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def update(self, clean: torch.Tensor) -> float:
        """One update; the loss that the example logs after each."""
        noise = torch.randn_like(clean)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        noisy = self.scheduler.add_noise(clean, noise, t)
        with torch.autocast(clean.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(noisy, t).sample
        loss = F.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.lr.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return loss.detach().item()


def endless(loader: torch.utils.data.DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """Batch after batch, epoch after epoch."""
    while True:
        yield from loader


@torch.no_grad()
def sample(unet: UNet2DModel, scheduler: DDPMScheduler, x: torch.Tensor, steps: int, generator: torch.Generator):
    """`steps` steps of stock's `DDPMPipeline`, from x_T on, over a chain of that many steps."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    return x
