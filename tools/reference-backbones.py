#!/usr/bin/env python3
"""Test vectors for the backbone loader, from the `transformers` library.

For each supported checkpoint layout: a tiny random model, saved in the layout of the model hub, one picture through
its image processor, and every hidden state. Run from the repository root, then commit what changed:

    python3 -m venv venv && venv/bin/pip install torch transformers safetensors pillow
    venv/bin/python tools/reference-backbones.py crates/nn/tests/vectors

The model is rounded to the precision of its file first and then run in f32, so that precision plays no part.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as t
from PIL import Image
from safetensors.torch import load_file, save_file

SIDE, PATCH, WIDTH, LAYERS, HEADS, MLP = 16, 4, 12, 2, 3, 24
SIZES = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=SIDE, patch_size=PATCH)
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
HALVES = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
BICUBIC, BILINEAR = 3, 2
PROCESSING = dict(do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True)


def square(n):
    return dict(height=n, width=n)


CLIP = (
    t.CLIPVisionConfig(**SIZES, intermediate_size=MLP),
    t.CLIPVisionModel, torch.float32, t.CLIPImageProcessorPil,
    PROCESSING
    | dict(resample=BICUBIC, size=dict(shortest_edge=SIDE), do_center_crop=True, crop_size=square(SIDE),
           image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]),
)

# Folder: (configuration, class, precision, image processor, its settings).
CASES = {
    "vit": (
        t.ViTConfig(**SIZES, intermediate_size=MLP, layer_norm_eps=1e-12),
        t.ViTForImageClassification, torch.float32, t.ViTImageProcessorPil,
        PROCESSING | HALVES | dict(resample=BILINEAR, size=SIDE),
    ),
    "vit-bare": (
        t.ViTConfig(**SIZES, intermediate_size=MLP, layer_norm_eps=1e-12, qkv_bias=False),
        t.ViTModel, torch.float16, t.ViTImageProcessorPil,
        PROCESSING | HALVES | dict(resample=BILINEAR, size=square(SIDE)),
    ),
    "deit": (
        t.DeiTConfig(**SIZES, intermediate_size=MLP),
        t.DeiTForImageClassificationWithTeacher, torch.bfloat16, t.DeiTImageProcessorPil,
        PROCESSING | IMAGENET | dict(resample=BICUBIC, size=18, do_center_crop=True, crop_size=SIDE),
    ),
    # The grid of positions is 5 x 5 and the input takes 4 x 4.
    "dinov2": (
        t.Dinov2Config(**SIZES | dict(image_size=20), mlp_ratio=2, layerscale_value=0.7),
        t.Dinov2Model, torch.float16, t.BitImageProcessorPil,
        PROCESSING | IMAGENET
        | dict(resample=BICUBIC, size=dict(shortest_edge=18), do_center_crop=True, crop_size=square(SIDE)),
    ),
    # The tower alone, and, below, the same within the files of the whole model.
    "clip-tower": CLIP,
    "clip": CLIP,
}


def picture():
    """A smooth picture that is wider than high, with a sharp edge."""
    y, x = np.mgrid[0:23, 0:31]
    planes = [128 + 90 * np.sin(x / 5 + c) * np.cos(y / (4 + c)) + 30 * (x > 12 + c) for c in range(3)]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def hidden_states(model, pixels):
    """The embedding and every block's output, by hooks, and the class token after the final norm."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    states = []
    first = lambda v: v[0] if isinstance(v, tuple) else v
    def enter(_, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])
    hooks = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda _, args, out: states.append(first(out))) for layer in layers]
    norm = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("layernorm", "post_layernorm"))
    with torch.no_grad():
        model(pixels)
        features = norm(states[-1][:, 0])
    for hook in hooks:
        hook.remove()
    return states, features


def within_whole_model(dir):
    """Turns the files of a CLIP tower into those of the whole model, as its publishers store it."""
    tensors = load_file(dir / "model.safetensors")
    tensors = {f"vision_model.{name}": v for name, v in tensors.items()} | {"logit_scale": torch.tensor(2.6592)}
    save_file(tensors, dir / "model.safetensors")
    config = json.loads((dir / "config.json").read_text())
    whole = dict(architectures=["CLIPModel"], model_type="clip", vision_config=config)
    (dir / "config.json").write_text(json.dumps(whole, indent=2) + "\n")


def main(out):
    image = picture()
    out.mkdir(parents=True, exist_ok=True)
    image.save(out / "picture.png")
    for seed, (name, (config, cls, dtype, processor, settings)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model = cls(config).eval()
        # Nothing keeps an initial value under which it would not matter: zero tokens, unit gains.
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p + 0.3 * torch.randn_like(p)).to(dtype).float())
        dir = out / name
        dir.mkdir(exist_ok=True)
        pixels = processor(**settings)(image, return_tensors="pt")["pixel_values"].float()
        states, features = hidden_states(model, pixels)
        assert len(states) == LAYERS + 1
        model.to(dtype).save_pretrained(dir)
        if name == "clip":
            within_whole_model(dir)
        (dir / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        expected = {"pixels": pixels, "features": features} | {f"hidden.{i}": s for i, s in enumerate(states)}
        save_file({k: v.float().contiguous() for k, v in expected.items()}, dir / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
