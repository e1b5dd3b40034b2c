"""What each node class makes of its inputs.

Values travel between nodes as `Frame` lists (IMAGE), `Latent`, prompt texts (CONDITIONING), Pillow "L" images
(MASK) and plain names (MODEL, CLIP, VAE). Nodes that save files are the worker's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageFilter, ImageOps

from forge.comfyui.simulator.folders import Folders
from forge.comfyui.simulator.pictures import Wish, draw
from forge.comfyui.simulator.png import Flat, Frame, image_of

Inputs = dict[str, Any]


class Latent(NamedTuple):
    """An undrawn picture: what to draw once it is decoded, and the picture it started from."""

    width: int
    height: int
    batch: int
    wish: Wish | None = None
    source: Frame | None = None
    mask: Image.Image | None = None
    denoise: float = 1.0


def compute(class_type: str, inputs: Inputs, folders: Folders) -> tuple[Any, ...]:
    """The outputs of one node. Inputs of a wrong type raise what they would raise in a real node."""
    if class_type in ("LoadImage", "LoadImageMask"):
        return _load(class_type, inputs, folders)
    return _NODES[class_type](inputs)


def is_heavy(class_type: str) -> bool:
    """Whether the work belongs in a thread."""
    return class_type not in _LIGHT


def _load(class_type: str, inputs: Inputs, folders: Folders) -> tuple[Any, ...]:
    path = folders.named_file(inputs["image"])
    if path is None:
        raise FileNotFoundError(inputs["image"])
    with Image.open(path) as opened:
        rgba = ImageOps.exif_transpose(opened).convert("RGBA")
    alpha = rgba.getchannel("A")
    if class_type == "LoadImageMask":
        channel = {"alpha": "A", "red": "R", "green": "G", "blue": "B"}[inputs["channel"]]
        mask = rgba.getchannel(channel)
        return (ImageChops.invert(mask) if channel == "A" else mask,)
    return [rgba.convert("RGB")], ImageChops.invert(alpha)


def _sample(inputs: Inputs) -> tuple[Latent]:
    latent: Latent = inputs["latent_image"]
    seed: Any = inputs.get("seed", inputs.get("noise_seed", 0))
    wish = Wish(inputs["positive"], inputs["negative"], int(seed), latent.width, latent.height)
    return (latent._replace(wish=wish, denoise=float(inputs.get("denoise", 1.0))),)


def _decode(inputs: Inputs) -> tuple[list[Frame]]:
    latent: Latent = inputs["samples"]
    return ([_picture(latent, index) for index in range(latent.batch)],)


def _picture(latent: Latent, index: int) -> Frame:
    if latent.wish is None:
        return latent.source or Flat(latent.width, latent.height, 0x7F7F7F)
    drawn = draw(latent.wish._replace(seed=latent.wish.seed + index))
    if latent.source is None or (latent.denoise >= 1 and latent.mask is None):
        return drawn
    source = image_of(latent.source).resize(drawn.size)
    changed = Image.blend(source, drawn, min(latent.denoise, 1.0))
    if latent.mask is None:
        return changed
    return Image.composite(changed, source, latent.mask.resize(drawn.size))


def _encode(inputs: Inputs) -> tuple[Latent]:
    frames: list[Frame] = inputs["pixels"]
    width, height = image_of(frames[0]).size
    return (Latent(width, height, len(frames), source=frames[0], mask=inputs.get("mask")),)


def _empty_image(inputs: Inputs) -> tuple[list[Frame]]:
    flat = Flat(inputs["width"], inputs["height"], inputs["color"])
    return ([flat] * inputs["batch_size"],)


def _scaled(frame: Frame, width: int, height: int, crop: str) -> Frame:
    if isinstance(frame, Flat):
        return frame._replace(width=width, height=height)
    fit = ImageOps.fit if crop == "center" else Image.Image.resize
    return fit(frame, (width, height), Image.Resampling.BILINEAR)


def _scale(inputs: Inputs) -> tuple[list[Frame]]:
    first = image_of(inputs["image"][0])
    width = inputs["width"] or max(1, round(first.width * inputs["height"] / first.height))
    height = inputs["height"] or max(1, round(first.height * inputs["width"] / first.width))
    return ([_scaled(frame, width, height, inputs["crop"]) for frame in inputs["image"]],)


def _scale_by(inputs: Inputs) -> tuple[list[Frame]]:
    factor = inputs.get("scale_by", 4)  # an upscale model, which has no such input, quadruples
    sizes = [image_of(frame).size for frame in inputs["image"]]
    return (
        [
            _scaled(frame, round(width * factor), round(height * factor), "disabled")
            for frame, (width, height) in zip(inputs["image"], sizes, strict=True)
        ],
    )


def _invert(inputs: Inputs) -> tuple[list[Frame]]:
    return ([_inverted(frame) for frame in inputs["image"]],)


def _inverted(frame: Frame) -> Frame:
    return frame._replace(rgb=0xFFFFFF - frame.rgb) if isinstance(frame, Flat) else ImageChops.invert(frame)


def _blur(inputs: Inputs) -> tuple[list[Frame]]:
    radius = ImageFilter.BoxBlur(inputs["blur_radius"])
    return ([frame if isinstance(frame, Flat) else frame.filter(radius) for frame in inputs["image"]],)


def _crop(inputs: Inputs) -> tuple[list[Frame]]:
    x, y = inputs["x"], inputs["y"]
    box = (x, y, x + inputs["width"], y + inputs["height"])
    return ([image_of(frame).crop(box) for frame in inputs["image"]],)


def _composite(inputs: Inputs) -> tuple[list[Frame]]:
    result = image_of(inputs["destination"][0]).copy()
    source = image_of(inputs["source"][0])
    if inputs["resize_source"]:
        source = source.resize(result.size)
    mask = inputs.get("mask")
    result.paste(source, (inputs["x"], inputs["y"]), mask.resize(source.size) if mask is not None else None)
    return ([result],)


def _upscaled_latent(inputs: Inputs) -> tuple[Latent]:
    latent: Latent = inputs["samples"]
    factor = inputs.get("scale_by", 0)
    width = round(latent.width * factor) or inputs["width"]
    height = round(latent.height * factor) or inputs["height"]
    source: Frame | None = latent.source if latent.wish is None else _picture(latent, 0)
    return (Latent(width, height, latent.batch, source=source),)


def _empty_latent(inputs: Inputs) -> tuple[Latent]:
    return (Latent(inputs["width"], inputs["height"], inputs["batch_size"]),)


def _channel(inputs: Inputs) -> tuple[Image.Image]:
    image = image_of(inputs["image"][0]).convert("RGBA")
    return (image.getchannel({"red": "R", "green": "G", "blue": "B", "alpha": "A"}[inputs["channel"]]),)


_NODES: dict[str, Callable[[Inputs], tuple[Any, ...]]] = {
    "CheckpointLoaderSimple": lambda i: (i["ckpt_name"],) * 3,
    "UNETLoader": lambda i: (i["unet_name"],),
    "CLIPLoader": lambda i: (i["clip_name"],),
    "DualCLIPLoader": lambda i: (i["clip_name1"],),
    "VAELoader": lambda i: (i["vae_name"],),
    "UpscaleModelLoader": lambda i: (i["model_name"],),
    "LoraLoader": lambda i: (i["model"], i["clip"]),
    "LoraLoaderModelOnly": lambda i: (i["model"],),
    "ModelSamplingSD3": lambda i: (i["model"],),
    "CLIPSetLastLayer": lambda i: (i["clip"],),
    "CLIPTextEncode": lambda i: (i["text"],),
    "ConditioningCombine": lambda i: (f"{i['conditioning_1']}, {i['conditioning_2']}",),
    "ConditioningConcat": lambda i: (f"{i['conditioning_to']}, {i['conditioning_from']}",),
    "FluxGuidance": lambda i: (i["conditioning"],),
    "EmptyLatentImage": _empty_latent,
    "EmptySD3LatentImage": _empty_latent,
    "LatentUpscale": _upscaled_latent,
    "LatentUpscaleBy": _upscaled_latent,
    "SetLatentNoiseMask": lambda i: (i["samples"]._replace(mask=i["mask"]),),
    "KSampler": _sample,
    "KSamplerAdvanced": _sample,
    "VAEDecode": _decode,
    "VAEDecodeTiled": _decode,
    "VAEEncode": _encode,
    "VAEEncodeForInpaint": _encode,
    "EmptyImage": _empty_image,
    "ImageScale": _scale,
    "ImageScaleBy": _scale_by,
    "ImageUpscaleWithModel": _scale_by,
    "ImageInvert": _invert,
    "ImageBlur": _blur,
    "ImageBatch": lambda i: ([*i["image1"], *i["image2"]],),
    "ImageCrop": _crop,
    "ImageCompositeMasked": _composite,
    "ImageToMask": _channel,
    "MaskToImage": lambda i: ([i["mask"].convert("RGB")],),
    "InvertMask": lambda i: (ImageChops.invert(i["mask"]),),
    "GrowMask": lambda i: (i["mask"],),
}
_LIGHT = {
    "EmptyImage",
    "EmptyLatentImage",
    "CheckpointLoaderSimple",
    "CLIPTextEncode",
    "LoraLoader",
    "KSampler",
}
