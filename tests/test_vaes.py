"""The table of tiny autoencoders is complete, and says of each what is true."""

import inspect

import pytest
import torch
from torch import nn

from .vaes import TABLE, Tiny

# Autoencoders of diffusers 0.42.1 without a Conv2d or Conv3d, and how to construct those that have no defaults.
WITHOUT_CONVOLUTION = {
    "AutoencoderKLKVAEAudio": {},
    "AutoencoderKLMiniMaxH3Audio": {},
    "AutoencoderOobleck": {},
    "AutoencoderSAME": {},
    "Cosmos3AVAEAudioTokenizer": {},
    "LTX2VideoDiffusionDecoderModel": {},
    "LongCatAudioDiTVae": {},
    "MMAudioVAE": {},
    "MMAudioVocoder": {},
    "MiniMaxMusic3Vocoder": {},
    "RFD4ProteinaAutoencoder": {"atom37_mask": [[True] * 37] * 20, "allowed_residue_types": list(range(20))},
}


def autoencoders() -> dict[str, type[nn.Module]]:
    from diffusers import ModelMixin
    from diffusers.models import autoencoders as package

    classes = dict(inspect.getmembers(package, inspect.isclass))
    return {name: cls for name, cls in classes.items() if issubclass(cls, ModelMixin)}


def each(condition=lambda tiny: True):
    return pytest.mark.parametrize("tiny", [tiny for tiny in TABLE if condition(tiny)], ids=lambda tiny: tiny.id)


def test_every_autoencoder_is_in_the_table_or_known_to_have_no_convolution():
    tabled = {tiny.vae_class for tiny in TABLE if tiny.home == "diffusers.models.autoencoders"}
    assert tabled <= set(autoencoders())
    assert set(autoencoders()) - tabled - set(WITHOUT_CONVOLUTION) == set()
    assert not tabled & set(WITHOUT_CONVOLUTION)


@pytest.mark.parametrize("name", WITHOUT_CONVOLUTION)
def test_those_left_out_have_no_convolution(name):
    from accelerate import init_empty_weights

    if name not in autoencoders():
        pytest.skip(f"{name} is not in this diffusers")
    with init_empty_weights():
        model = autoencoders()[name](**WITHOUT_CONVOLUTION[name])
    assert not [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]


def test_ids_are_unique():
    assert len({tiny.id for tiny in TABLE}) == len(TABLE)


@each()
@torch.no_grad()
def test_decodes_and_encodes(tiny: Tiny):
    vae = tiny.build()
    assert not vae.training
    assert any(isinstance(m, (nn.Conv2d, nn.Conv3d)) for m in vae.modules())
    frames = tiny.decode(vae, tiny.latent())
    assert frames.shape == tiny.pixel_shape
    assert 0.05 < frames.std() < 1 and frames.isfinite().all()
    assert torch.equal(frames, tiny.decode(vae, tiny.latent())), "no state is left behind"
    latent = tiny.encode(vae, tiny.pixels())
    assert latent.shape == tiny.latent_shape
    assert latent.std() > 0.01 and latent.isfinite().all()


@each()
@torch.no_grad()
def test_reads_its_latent(tiny: Tiny):
    vae = tiny.build()
    first, second = (tiny.decode(vae, tiny.latent(kind)) for kind in ("picture", "ramp"))
    assert (first - second).abs().max() > 0.01


@each(lambda tiny: tiny.video and tiny.single_frame)
@torch.no_grad()
def test_decodes_a_single_frame(tiny: Tiny):
    batch, channels, _, height, width = tiny.pixel_shape
    assert tiny.decode(tiny.build(), tiny.single_frame_latent()).shape == (batch, channels, 1, height, width)


@each(lambda tiny: tiny.video and tiny.latent_shape[2] > 1)
@torch.no_grad()
def test_causal_means_that_the_past_does_not_see_the_future(tiny: Tiny):
    vae = tiny.build()
    latent = tiny.latent()
    changed = latent.clone()
    changed[:, :, -1] += 1
    steps = (tiny.pixel_shape[2] - 1) // (tiny.latent_shape[2] - 1)
    past = [tiny.decode(vae, value)[:, :, :-steps] for value in (latent, changed)]
    assert torch.allclose(*past, atol=1e-5) == tiny.causal


@each(lambda tiny: tiny.batch)
@torch.no_grad()
def test_decodes_a_batch(tiny: Tiny):
    size = 2 * tiny.latent_shape[0]
    assert tiny.decode(tiny.build(), tiny.latent(batch=size)).shape[0] == size


@each(lambda tiny: tiny.tiling)
@torch.no_grad()
def test_decodes_in_tiles(tiny: Tiny):
    vae = tiny.build()
    tiled_already = vae.use_tiling
    whole = tiny.decode(vae, tiny.latent())
    tiled = tiny.decode(tiny.tile(vae), tiny.latent())
    assert tiled.shape == whole.shape
    assert tiled_already or not torch.equal(tiled, whole), "the tiles are smaller than the picture"


@each(lambda tiny: tiny.slicing and tiny.batch)
@torch.no_grad()
def test_decodes_in_slices(tiny: Tiny):
    vae = tiny.build()
    latent = tiny.latent(batch=2 * tiny.latent_shape[0])
    whole = tiny.decode(vae, latent)
    vae.enable_slicing()
    assert torch.allclose(tiny.decode(vae, latent), whole, atol=1e-4)
