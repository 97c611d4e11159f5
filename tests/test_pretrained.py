"""Published weights: networks against what diffusers computed with the same files, and files that do not fit."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import diffjax
from diffjax import networks
from diffjax.networks import pretrained
from diffjax.networks.pretrained import files

DATA = Path(__file__).parent / "fixtures" / "pretrained"
NAMES = ["ddpm", "consistency", "fourier", "stable", "xl", "upscaler", "dit"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def example(name):
    return load_file(DATA / name / "example.safetensors")


def copied(name, tmp_path):
    """A folder of its own, to be changed."""
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    (folder / "example.safetensors").unlink()
    return folder


def changed(folder, change):
    """The same weights, changed by a function of the dictionary of tensors."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The weights without the examples, which are safetensors too."""
    place = tmp_path_factory.mktemp("published")
    return {name: copied(name, place) for name in (*NAMES, "vae")}


def close(found, expected, relative=1e-4):
    """Within a share of the largest entry: sums of float32 in another order."""
    np.testing.assert_allclose(found, expected, atol=relative * np.max(np.abs(expected)), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_computes_what_the_peer_computed(name, folders):
    stored, found = example(name), pretrained.network(folders[name])
    told = tuple(jnp.asarray(stored[part]) for part in found.inputs)
    y = jax.jit(jax.vmap(found.apply, (None, 0, 0, 0)))(found.params, stored["x"], stored["t"], told)
    assert y.dtype == jnp.float32
    assert np.ptp(stored["y"]) > 0.1  # there is something to compare
    close(y, stored["y"])


def test_the_autoencoder_computes_what_the_peer_computed(folders):
    stored = example("vae")
    model, params = pretrained.autoencoder(folders["vae"])
    config = json.loads((folders["vae"] / "config.json").read_text())
    scale, shift = config["scaling_factor"], config["shift_factor"]
    mean, std = jax.jit(jax.vmap(model.posterior, (None, 0)))(params, stored["image"])
    close(mean, scale * (stored["mean"] - shift))
    close(std, scale * stored["std"])
    decode = jax.jit(jax.vmap(model.decode, (None, 0)))
    close(decode(params, scale * (stored["z"] - shift)), stored["decoded"])
    key = jax.random.key(0)
    drawn = model.encode(params, jnp.asarray(stored["image"][0]), key)
    close(drawn, mean[0] + std[0] * jax.random.normal(key, mean[0].shape))
    assert hash(model) == hash(pretrained.autoencoder(folders["vae"])[0])
    with pytest.raises(ValueError, match=r"H and W divisible by 2 to encode it.*got shape \(15, 16, 3\)"):
        model.encode(params, jnp.zeros((15, 16, 3)))


@pytest.mark.parametrize("name", ["stable", "dit"])
def test_a_whole_pipeline_samples_as_the_peer_did(name, folders, tmp_path):
    """Process, prediction, grid and the network's time: four steps of DDIM from the same noise."""
    stored = example(name)
    kind = "unet" if name == "stable" else "transformer"
    (tmp_path / kind).symlink_to(folders[name])
    (tmp_path / "scheduler").symlink_to(folders[name])
    if name == "stable":
        (tmp_path / "vae").symlink_to(folders["vae"])
    found = pretrained.pipeline(tmp_path, steps=4)
    assert found.shape == (8, 8, 4) and (found.autoencoder is not None) == (name == "stable")
    told = stored["tokens" if name == "stable" else "label"]

    def draw(x, condition):
        denoise = found.prediction.decode(found.apply, found.params, condition=condition)
        return diffjax.sample(jax.random.key(0), denoise, diffjax.solvers.ddim(), found.grid, x=x).x

    # the peer's noise has variance 1 where the process has sigma: they are the same at the first level
    x = stored["x"] * np.sqrt(found.grid.start.alpha**2 + found.grid.start.sigma**2)
    close(jax.vmap(draw)(x, told), stored["end"], 1e-3)  # four networks deep


def test_older_names_and_shards_are_read(folders, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(tensors):
        for name in [name for name in tensors if ".attentions." in name]:
            for new, before in old.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{before}.")] = tensors.pop(name)
        return tensors

    folder = copied("vae", tmp_path)
    changed(folder, renamed)
    tensors = load_file(folder / WEIGHTS)
    assert any("proj_attn" in name for name in tensors)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    expected = pretrained.autoencoder(folders["vae"])[1]
    jax.tree.map(np.testing.assert_array_equal, pretrained.autoencoder(folder)[1], expected)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks: \['b.safetensors'\]"):
        pretrained.autoencoder(folder)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_widened(kind, tmp_path):
    folder = copied("dit", tmp_path)
    changed(folder, lambda tensors: {name: np.asarray(t, jnp.dtype(kind)) for name, t in tensors.items()})
    params = pretrained.network(folder).params
    full = load_file(DATA / "dit" / WEIGHTS)["proj_out_1.weight"].T
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(params["proj_out_1"]["kernel"], full, rtol=2**-8)


def test_a_published_network_is_rebuilt_from_its_architecture(folders):
    found = pretrained.network(folders["dit"])
    description = json.loads(json.dumps(networks.architecture(found.apply)))
    apply, params = networks.functional(networks.build(description, nnx.Rngs(0)))
    assert apply == found.apply and hash(apply) == hash(found.apply)
    assert jax.tree.structure(params) == jax.tree.structure(found.params)
    with pytest.raises(ValueError, match="must be one of"):
        pretrained.module({"_class_name": "Flux"}, nnx.Rngs(0))


def test_weights_that_do_not_fit_are_named(tmp_path):
    folder = copied("dit", tmp_path)
    tensors = load_file(folder / WEIGHTS)

    def broken(**changes):
        save_file({name: t for name, t in {**tensors, **changes}.items() if t is not None}, folder / WEIGHTS)
        with pytest.raises(ValueError, match=r"do not fit config\.json") as error:
            pretrained.network(folder)
        return str(error.value)

    # a linear layer is (out, in) on disk
    assert "proj_out_1.weight: expected [32, 16], found none" in broken(**{"proj_out_1.weight": None})
    shape = {"proj_out_1.weight": np.zeros((32, 17), np.float32)}
    assert "proj_out_1.weight: expected [32, 16], found [32, 17]" in broken(**shape)
    patch = {"pos_embed.proj.weight": np.zeros((16, 4, 3, 2), np.float32)}
    assert "pos_embed.proj.weight: expected [16, 4, 2, 2], found [16, 4, 3, 2]" in broken(**patch)
    assert "stray.weight: expected no such tensor, found [3]" in broken(**{"stray.weight": np.zeros(3, np.float32)})
    many = {name: None for name in tensors if name.startswith("transformer_blocks.0")}
    assert f"and {len(many) - 8} more" in broken(**many)
    assert "transformer_blocks.0" in broken(**many)


def test_folders_that_hold_something_else_are_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none"):
        pretrained.network(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="huggingface_hub must be installed"):
        pretrained.network("owner/name")
    with pytest.raises(FileNotFoundError, match=r"expected config.json in .*found \[\]"):
        pretrained.network(tmp_path)
    with pytest.raises(ValueError, match=r"one of .*UNet2DModel.*found 'AutoencoderKL'"):
        pretrained.network(folders["vae"])
    with pytest.raises(FileNotFoundError, match=r"expected a folder unet or transformer in .*found \[\]"):
        pretrained.pipeline(tmp_path, 2)
    folder = copied("dit", tmp_path)
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    with pytest.raises(ValueError, match="several sets of weights"):
        pretrained.network(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a .safetensors file"):
        pretrained.network(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="reading them can run code"):
        pretrained.network(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        pretrained.network(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        pretrained.network(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "stable",
            {"dual_cross_attention": True},
            r"dual_cross_attention of UNet2DConditionModel must be one of \(False",
        ),
        ("stable", {"something_new": 3}, r"fields that are not read: {'something_new': 3}"),
        ("stable", {"attention_head_dim": 3}, "must divide the channels"),
        ("stable", {"attention_head_dim": [1, 2, 3]}, "an entry for each of 2 resolutions"),
        ("stable", {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "down_block_types of .* got .*KDownBlock2D"),
        ("ddpm", {"norm_num_groups": 3}, "norm_num_groups=3 must divide the channels"),
        ("ddpm", {"norm_num_groups": None}, "norm_num_groups must be a positive integer, got None"),
        ("ddpm", {"up_block_types": ["UpBlock2D"]}, "up_block_types of UNet2DModel must be 3 of"),
        ("dit", {"norm_type": "layer_norm"}, "norm_type of DiTTransformer2DModel must be one of"),
        ("dit", {"patch_size": 3}, "patch_size=3 must divide sample_size=8"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(name, change, message, tmp_path):
    folder = copied(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        pretrained.network(folder)


def test_inputs_that_do_not_fit_are_refused(folders):
    found = pretrained.network(folders["xl"])
    assert found.inputs == ("tokens", "guidance", "text", "sizes")
    x = jnp.zeros((8, 8, 4))
    with pytest.raises(ValueError, match=r"needs the condition \('tokens', 'guidance', 'text', 'sizes'\), got 0"):
        found.apply(found.params, x, 1.0)
    told = (jnp.zeros((2, 5, 12)), jnp.zeros(6), jnp.zeros(6), jnp.zeros(6))
    with pytest.raises(ValueError, match=r"condition tokens must have 2 axes.*got shape \(2, 5, 12\)"):
        found.apply(found.params, x, 1.0, told)
    with pytest.raises(ValueError, match=r"H and W divisible by 4.*got shape \(6, 8, 4\)"):
        found.apply(found.params, x[:6], 1.0, told)
    dit = pretrained.network(folders["dit"])
    with pytest.raises(ValueError, match=r"one image of shape \(8, 8, 4\)"):
        dit.apply(dit.params, x[:4], 1.0, 3)


def test_nothing_is_unpickled():
    """No reader that can run code is named in the package."""
    for file in Path(files.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert not any(word in text for word in ("import pickle", "torch.load", "allow_pickle=True", "import torch"))
