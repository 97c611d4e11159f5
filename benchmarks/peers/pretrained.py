"""Small models of public configurations with random weights, and what they compute: run with diffusers and PyTorch.

    python -m venv peers && peers/bin/pip install torch diffusers transformers safetensors numpy
    peers/bin/python benchmarks/peers/pretrained.py            # writes tests/fixtures/pretrained

For each model a folder as diffusers writes it, and `example.safetensors` with inputs and outputs, of the network and
(`end`) of a whole DDIM loop of diffusers from the same noise.  `tests/test_pretrained.py` compares diffjax with them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

OUT = Path(__file__).parents[2] / "tests" / "fixtures" / "pretrained"
STEPS = 4
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}

UNCONDITIONAL = {"in_channels": 3, "out_channels": 3, "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 2}
CONDITIONAL = {"in_channels": 4, "out_channels": 4, "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 2}

# like google/ddpm-cifar10-32: asymmetric padding, sine first, one head as wide as the features
DDPM = UNCONDITIONAL | {
    **{"block_out_channels": (4, 8, 8), "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    **{"norm_eps": 1e-6, "attention_head_dim": None, "layers_per_block": 2},
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# like openai/diffusers-cd_imagenet64_l2: resolution changed by residual blocks, scale and shift, classes
CONSISTENCY = UNCONDITIONAL | {
    **{"block_out_channels": (4, 8, 12), "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 4},
    **{"num_class_embeds": 5, "downsample_type": "resnet", "upsample_type": "resnet", "attn_norm_num_groups": 4},
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
# random Fourier features of the time, as the networks of score matching have
FOURIER = UNCONDITIONAL | {
    **{"block_out_channels": (4, 4), "time_embedding_type": "fourier", "class_embed_type": "timestep"},
    **{"mid_block_scale_factor": 1.4142, "center_input_sample": True, "act_fn": "mish", "add_attention": False},
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
# like stable-diffusion-v1-5
STABLE = CONDITIONAL | {
    **{"block_out_channels": (4, 8), "attention_head_dim": 2, "cross_attention_dim": 12},
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# like stable-diffusion-xl-base-1.0, and distilled: depths, heads by resolution, pooled text and sizes, guidance
XL = CONDITIONAL | {
    **{"block_out_channels": (4, 8, 8), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 12},
    **{"transformer_layers_per_block": (1, 2, 1), "use_linear_projection": True, "addition_embed_type": "text_time"},
    **{"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 + 6 * 4, "time_cond_proj_dim": 6},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
# like stable-diffusion-x4-upscaler: a noise level as class, attention to the text only
UPSCALER = CONDITIONAL | {
    **{"in_channels": 7, "block_out_channels": (4, 8), "attention_head_dim": 2, "cross_attention_dim": 12},
    **{"only_cross_attention": (True, False), "num_class_embeds": 10, "use_linear_projection": True},
    **{"class_embeddings_concat": True, "encoder_hid_dim": 10, "encoder_hid_dim_type": "text_proj"},
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
# like facebook/DiT-XL-2-256
DIT = {
    **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2},
    **{"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5},
}
VAE = {
    **{"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4},
    **{"scaling_factor": 0.18215, "shift_factor": 0.1, "sample_size": 16},
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}


def made(kind: Any, config: dict, seed: int) -> Any:
    """A model with random weights, biases and scales: none of them is one that a mistake could pass unseen."""
    torch.manual_seed(seed)
    model = kind(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def saved(name: str, model: Any, example: dict[str, torch.Tensor], config: dict | None = None) -> None:
    """The folder of a model."""
    folder = OUT / name
    model.save_pretrained(folder)
    if config is not None:
        (folder / "scheduler_config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({key: value.detach().contiguous() for key, value in example.items()}, folder / "example.safetensors")
    print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


def last(image: torch.Tensor) -> torch.Tensor:
    """Channels last, as diffjax has them."""
    return image.permute(0, 2, 3, 1)


def unet(name: str, kind: Any, config: dict, seed: int, **told: torch.Tensor) -> None:
    """A U-Net, and what it makes of two samples that are told ``told``."""
    model = made(kind, config, seed)
    x, t = torch.randn(2, config["in_channels"], 8, 8), torch.tensor([17.0, 731.0])
    arguments: dict[str, Any] = {}
    if "tokens" in told:
        arguments["encoder_hidden_states"] = told["tokens"]
    for key in ("label", "class"):
        if key in told:
            arguments["class_labels"] = told[key]
    if "guidance" in told:
        arguments["timestep_cond"] = told["guidance"]
    if "text" in told:
        arguments["added_cond_kwargs"] = {"text_embeds": told["text"], "time_ids": told["sizes"]}
    with torch.no_grad():
        example = {"x": last(x), "t": t, "y": last(model(x, t, **arguments).sample), **told}
        scheduler = None
        if name == "stable":
            scheduler = {"_class_name": "DDIMScheduler", **SCHEDULER}
            step = lambda x, t: model(x, t, **arguments).sample
            example["end"] = last(looped(step, x))
    saved(name, model, example, scheduler)


def looped(step: Any, x: torch.Tensor) -> torch.Tensor:
    """The end of a DDIM loop from x."""
    scheduler = diffusers.DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(step(x, t), t, x).prev_sample
    return x


def dit() -> None:
    """A diffusion transformer that learned its variance; one of its samples has the null class."""
    model = made(diffusers.DiTTransformer2DModel, DIT, 6)
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([17.0, 731.0]), torch.tensor([3, 5])
    with torch.no_grad():
        step = lambda x, t: model(x, torch.full((2,), float(t)), class_labels=label).sample.chunk(2, 1)[0]
        example = {"x": last(x), "t": t, "label": label, "end": last(looped(step, x))}
        example["y"] = last(model(x, t, class_labels=label).sample)
    saved("dit", model, example, {"_class_name": "DDIMScheduler", **SCHEDULER})


def vae() -> None:
    """An autoencoder, both ways."""
    model = made(diffusers.AutoencoderKL, VAE, 7)
    image, z = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        posterior = model.encode(image).latent_dist
        example = {"image": last(image), "z": last(z), "decoded": last(model.decode(z).sample)}
        example |= {"mean": last(posterior.mean), "std": last(posterior.std)}
    saved("vae", model, example)


def main() -> None:
    """All of them."""
    free, told = diffusers.UNet2DModel, diffusers.UNet2DConditionModel
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, 12)
    unet("ddpm", free, DDPM, 1)
    unet("consistency", free, CONSISTENCY, 2, label=torch.tensor([4, 1]))
    unet("fourier", free, FOURIER, 3, **{"class": torch.tensor([3.0, 250.0])})
    unet("stable", told, STABLE, 4, tokens=tokens)
    more = {"guidance": torch.randn(2, 6), "text": torch.randn(2, 6), "sizes": torch.rand(2, 6) * 512}
    unet("xl", told, XL, 5, tokens=tokens, **more)
    unet("upscaler", told, UPSCALER, 8, tokens=torch.randn(2, 5, 10), label=torch.tensor([4, 1]))
    dit()
    vae()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": sys.version.split()[0]}
    (OUT / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
