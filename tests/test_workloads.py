import dataclasses
import subprocess
import sys

import pytest
import torch

from vae_accel.workloads import TOWERS, WORKLOADS, Size, decode, encode, get
from vae_accel.workloads.inputs import PHOTOGRAPHS, latents, photograph, pixels
from vae_accel.workloads.weights import build_random

# Millions of parameters of the decoder and the encoder, counted on the published checkpoints' architectures.
PARAMETERS = {
    "wan2.1": (73.3, 53.6),
    "wan2.2-5b": (555.0, 149.6),
    "qwen-image": (73.3, 53.6),
    "qwen-image-2.1": (259.0, 78.7),
    "hunyuan-video": (146.1, 100.3),
    "hunyuan-video-1.5": (871.3, 389.3),
    "hunyuan-image": (260.6, 145.0),
    "hunyuan-image-refiner": (871.3, 389.3),
    "cogvideox": (123.4, 92.2),
    "mochi": (362.5, 97.2),
    "cosmos": (62.7, 42.9),
    "ltx-0.9.0": (238.8, 180.4),
    "ltx-0.9.5": (552.8, 694.1),
    "ltx-2.0": (528.4, 694.1),
    "ltx-2.3": (407.2, 318.9),
    "easyanimate": (145.1, 99.3),
    "allegro": (111.0, 64.0),
    "svd": (63.6, 34.2),
    "sd1.5": (49.5, 34.2),
    "sdxl": (49.5, 34.2),
    "flux.1": (49.5, 34.3),
    "flux.2": (49.6, 34.4),
    "dc-ae": (159.2, 153.0),
    "kvae": (131.3, 86.2),
    "kvae-video": (367.6, 250.4),
    "kandinsky6-sr": (1463.1, 275.8),
    "vidtok": (88.2, 69.3),
}
LATENTS = {
    "wan2.1": (1, 16, 21, 60, 104),
    "wan2.2-5b": (1, 48, 31, 44, 80),
    "qwen-image": (1, 16, 1, 166, 166),
    "cogvideox": (1, 16, 13, 60, 90),
    "mochi": (1, 12, 14, 60, 106),
    "cosmos": (1, 16, 16, 88, 160),
    "ltx-2.3": (1, 128, 16, 16, 24),
    "allegro": (1, 4, 22, 90, 160),
    "svd": (25, 4, 72, 128),
    "sdxl": (1, 4, 128, 128),
    "dc-ae": (1, 32, 32, 32),
}
# Small enough for a second on one core; between them a video, an image, and a clip whose frames are the batch.
SMALL = ("wan2.1", "sd1.5", "svd")
WAN_SMALL = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def on_meta(workload) -> torch.nn.Module:
    from accelerate import init_empty_weights

    from vae_accel.workloads.weights import vae_class

    with init_empty_weights():
        return vae_class(workload.vae_class)(**workload.config)


def test_every_workload_is_counted():
    assert set(PARAMETERS) == set(WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_configuration_is_the_checkpoints(name):
    vae = on_meta(get(name))
    counted = tuple(round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for part in (vae.decoder, vae.encoder))
    assert counted == PARAMETERS[name]


@pytest.mark.parametrize("name", LATENTS)
def test_latent_shapes_at_the_default_size(name):
    workload = get(name)
    assert workload.latent_shape(workload.size()) == LATENTS[name]


@pytest.mark.parametrize("name", WORKLOADS)
def test_tiny_is_a_size_of_the_workload_and_below_its_default(name):
    workload = get(name)
    tiny, default = workload.tiny(), workload.size()
    assert workload.size(str(tiny)) == tiny
    assert tiny.height * tiny.width * tiny.frames < default.height * default.width * default.frames
    assert (tiny.frames == 1) == (default.frames == 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("wan2.1", "480", "not HEIGHTxWIDTH"),
        ("wan2.1", "480x832x81x2", "not HEIGHTxWIDTH"),
        ("wan2.1", "480*832", "such as 480x832x81"),
        ("wan2.1", "0x832", "side of zero"),
        ("wan2.1", "484x832x81", "height 484 is not a multiple of 8; 480 or 488 is"),
        ("ltx-2.3", "512x770x121", "width 770 is not a multiple of 32; 768 or 800 is"),
        ("wan2.1", "480x832x80", r"80 frames are not 1 \+ a multiple of 4; 77 or 81 is"),
        ("cogvideox", "480x720x45", r"1 \+ a multiple of 8; 41 or 49 is"),
        ("allegro", "720x1280x89", "not a multiple of 4; 88 or 92 is"),
        ("allegro", "320x320x20", "below 320x320x24"),
        ("sdxl", "1024x1024x5", "takes images"),
        ("qwen-image-2.1", "1328x1328x5", "takes images"),
    ],
)
def test_sizes_that_do_not_fit_say_what_does(name, text, message):
    with pytest.raises(ValueError, match=message):
        get(name).size(text)


def test_sizes_parse():
    assert Size.parse("480x832x81") == Size(480, 832, 81)
    assert Size.parse("1024x768") == Size(1024, 768, 1)
    assert str(Size(480, 832, 81)) == "480x832x81" and str(Size(64, 96)) == "64x96"


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(ValueError, match=r"wan2\.1, wan2\.2-5b"):
        get("wan3")
    with pytest.raises(ValueError, match="picture, ramp, noise"):
        latents("photo", (1, 4, 8, 8))
    with pytest.raises(ValueError, match="decode or encode"):
        get("sdxl").inputs("noise", "both")


@pytest.mark.parametrize("name", SMALL)
def test_decode_and_encode_end_to_end(name):
    workload = get(name)
    size = workload.tiny()
    vae = workload.build(torch.float32, "cpu")
    assert not vae.training
    with torch.no_grad():
        frames = decode(vae, workload.inputs("picture", size=size))
        latent = encode(vae, workload.inputs("picture", "encode", size))
    assert frames.shape == workload.pixel_shape(size)
    assert latent.shape == workload.latent_shape(size)
    assert 0.05 < frames.std() < 1, "random weights that neither die away nor blow up"


@pytest.mark.parametrize("name", ["wan2.1", "qwen-image"])
def test_what_ends_in_a_clamp_stays_off_it(name):
    """Wan and Qwen-Image clamp to [-1, 1]: a pixel that lies there hides its error."""
    workload = get(name)
    vae = workload.build(torch.float32, "cpu")
    for kind in ("picture", "ramp", "noise"):
        with torch.no_grad():
            frames = decode(vae, workload.inputs(kind, size=workload.tiny()))
        assert (frames.abs() == 1).float().mean() < 1e-3


def test_weights_are_the_seeds_on_any_dtype():
    build = {"class_name": "AutoencoderKLWan", "config": WAN_SMALL, "device": "cpu"}
    first, again = (build_random(**build, dtype=torch.float32, seed=3).state_dict() for _ in range(2))
    other = build_random(**build, dtype=torch.float32, seed=4).state_dict()
    low = build_random(**build, dtype=torch.bfloat16, seed=3).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert all(torch.equal(first[key].bfloat16(), low[key]) for key in first)


def test_buffers_are_kept():
    """Cosmos computes its Haar wavelets in buffers: they are no weights to draw at random."""
    config = {
        "latent_channels": 4,
        "encoder_block_out_channels": (8,) * 4,
        "decode_block_out_channels": (8,) * 4,
        "num_layers": 1,
        "latents_mean": None,
        "latents_std": None,
    }
    vae = build_random("AutoencoderKLCosmos", config, dtype=torch.float32, device="cpu")
    wavelets = dict(vae.named_buffers())["decoder.unpatch_embed.wavelets"]
    assert torch.allclose(wavelets, torch.full_like(wavelets, 2**-0.5))


def test_a_checkpoint_is_loaded_from_its_own_folder_or_a_pipelines(tmp_path):
    workload = get("wan2.1")
    saved = build_random(workload.vae_class, WAN_SMALL, dtype=torch.float32, device="cpu", seed=7)
    for folder in (tmp_path / "plain", tmp_path / "pipeline" / "vae"):
        saved.save_pretrained(folder)
    for model in (tmp_path / "plain", tmp_path / "pipeline"):
        loaded = workload.build(torch.float32, "cpu", model=model)
        assert loaded.config.base_dim == 8
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_half_written_checkpoint_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    workload = get("wan2.1")
    build_random(workload.vae_class, WAN_SMALL, dtype=torch.float32, device="cpu").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_out.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"decoder\.conv_out\.weight"):
        workload.build(torch.float32, "cpu", model=tmp_path)


def test_a_checkpoint_of_another_class_is_refused(tmp_path):
    get("sd1.5").build(torch.float16, "cpu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a AutoencoderKL: wan2\.1 is a AutoencoderKLWan"):
        get("wan2.1").build(torch.float32, "cpu", model=tmp_path)


@pytest.mark.parametrize("kind", ["picture", "ramp", "noise"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 24, 40), (1, 4, 1, 16, 16), (2, 3, 24, 40)])
def test_pixels_fill_their_range_and_follow_their_seed(kind, shape):
    frames = pixels(kind, shape, seed=1)
    assert frames.shape == shape and frames.dtype == torch.float32
    assert frames.abs().max() <= 1 and frames.std() > 0.05
    assert torch.equal(frames, pixels(kind, shape, seed=1))
    assert not torch.equal(frames, pixels(kind, shape, seed=2))


@pytest.mark.parametrize("kind", ["picture", "ramp", "noise"])
@pytest.mark.parametrize("shape", [(2, 16, 5, 12, 20), (2, 16, 12, 20)])
def test_latents_have_about_unit_variance(kind, shape):
    latent = latents(kind, shape)
    assert latent.shape == shape
    assert 0.7 < latent.std() < 1.4
    assert torch.equal(latent, latents(kind, shape))


def test_a_picture_moves_and_a_ramp_has_an_offset():
    clip = pixels("picture", (1, 3, 5, 32, 48))
    assert all(not torch.equal(clip[:, :, 0], clip[:, :, t]) for t in range(1, 5))
    assert latents("ramp", (1, 16, 3, 8, 8)).mean((2, 3, 4)).abs().max() > 0.3


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_in_the_wheel(name):
    image = photograph(name)
    assert image.ndim == 3 and image.shape[0] == 3
    assert image.min() >= -1 and image.max() <= 1 and image.std() > 0.1


def test_import_is_light():
    code = "import sys, vae_accel.workloads; print([m for m in ('diffusers', 'skimage', 'triton') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_batches_of_grids_in_short():
    tower = get("qwen2-vl")
    grids = tower.size("3*1x4x6+2x2x4")
    assert grids.each == ((1, 4, 6),) * 3 + ((2, 2, 4),) and str(grids) == "3*1x4x6+2x2x4"
    assert tower.size("1x4x6+1x4x6+1x4x6+2x2x4") == grids
    fed = tower.inputs("noise", "embed", grids)
    assert fed["hidden_states"].shape == (3 * 24 + 16, 3 * 2 * 14 * 14) and fed["grid_thw"].tolist()[3] == [2, 2, 4]
    assert not torch.equal(fed["hidden_states"][:24], fed["hidden_states"][24:48])


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("qwen2-vl", "0*1x4x6", "not TxHxW"),
        ("qwen2-vl", "1x4x0", "not TxHxW"),
        ("qwen2-vl", "2*", "not TxHxW"),
        ("qwen2-vl", "1x3x6", "odd side"),
        ("siglip2", "2x4x6", "images, not clips"),
        ("dinov2", "1x518x518", "takes images of 1x224x224 only"),
    ],
)
def test_sizes_that_a_tower_does_not_take(name, text, told):
    with pytest.raises(ValueError, match=told):
        get(name).size(text)


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_towers_run_what_they_are_fed(tower):
    shallow = {"depth": 1} if tower.form == "packed" else {"num_hidden_layers": 1}
    deepstack = {"deepstack_visual_indexes": [0]} if tower.name == "qwen3-vl" else {}
    tower = dataclasses.replace(tower, config={**tower.config, **shallow, **deepstack})
    model = tower.build(torch.float32, "cpu")
    fed = tower.inputs("picture", "embed", tower.tiny())
    before = {k: v.clone() for k, v in fed.items()}
    with torch.no_grad():
        out = tower.run(model, "embed", fed)
    assert out.isfinite().all() and out.std() > 0 and all(torch.equal(fed[k], v) for k, v in before.items())
    grids = tower.tiny().each
    if tower.form == "packed":
        assert len(out) == sum(t * h * w // 4 for t, h, w in grids)
    elif tower.form == "naflex":
        assert out.shape == (2, 256, 1152) and fed["pixel_attention_mask"].sum(1).tolist() == [24, 8]
        image = pixels("picture", (1, 3, 64, 96))[0]
        assert torch.equal(fed["pixel_values"][0, 7], image[:, 16:32, 16:32].permute(1, 2, 0).reshape(-1))
