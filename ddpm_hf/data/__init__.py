"""Files, folders and datasets as uint8 tensors `[N, C, H, W]`."""

from .datasets import ImageDataset, Images, LazyImageDataset, StreamedImages, load_images

__all__ = ["ImageDataset", "Images", "LazyImageDataset", "StreamedImages", "load_images"]
