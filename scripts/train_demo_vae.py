"""Train the demo VAE of `vae_accel/data` on moving crops of the photographs in the scikit-image wheel.

    python scripts/train_demo_vae.py demo_vae --minutes 8 --compile --channels-last [--resume vae_accel/data]

Writes the weights (16-bit safetensors), config.json and metrics.json into a folder; `scripts/demo_vae_card.py` then
brings the model card up to date. A single large GPU is assumed for a real run; `--minutes 0.2 --batch 2 --frames 5
--size 64` is a smoke test for a CPU.
"""

import copy
import json
import math
import random
import time
from pathlib import Path
from typing import Annotated

import diffusers
import skimage.data
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vae_accel.demo import HELD_OUT, camera_crop, demo_clip

# How often each photograph is drawn: the ones rich in colour and detail more often than skies, stars and black borders.
PHOTOGRAPHS = {
    **{"astronaut": 4, "motorcycle_left": 3, "motorcycle_right": 3, "immunohistochemistry": 2, "rocket": 2},
    **dict.fromkeys(["hubble_deep_field", "retina", "camera", "brick", "grass", "gravel"], 1),
    **dict.fromkeys(["moon", "coins", "page", "text", "clock"], 1),
}
CLIPS_EVALUATED = {"17x256x256": (17, 256), "5x128x128": (5, 128)}
Z_DIM = 16


def photograph(name: str) -> Tensor:
    """A photograph bundled in the scikit-image wheel, `[3, H, W]` in [0, 1]; grey ones get three equal channels."""
    if name in ("motorcycle_left", "motorcycle_right"):
        pixels = skimage.data.stereo_motorcycle()[name == "motorcycle_right"]
    else:
        pixels = getattr(skimage.data, name)()
    image = torch.from_numpy(pixels.copy()).float() / 255
    return image.expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1).contiguous()


def build_vae() -> AutoencoderKLWan:
    """Wan2.1's VAE with every part it has, at 1/6 of the decoder's width, so that 16-bit weights stay below 4 MB."""
    vae = AutoencoderKLWan(
        base_dim=10,
        decoder_base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    # PyTorch's default convolution weights lose two thirds of the variance a layer, and the colours drown in biases
    # (12.0 dB after 150 steps against 16.5 dB). Keep the variance, start the blocks near the identity and the latent
    # nearly without noise.
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.data.mul_(0.1)
    vae.quant_conv.weight.data[Z_DIM:] *= 0.1
    vae.quant_conv.bias.data[Z_DIM:] = -6.0
    return vae


class Clips:
    """An endless stream of augmented clips `[batch, 3, frames, size, size]` in [-1, 1], made on the device."""

    def __init__(self, batch: int, frames: int, size: int, device: str, photos_per_batch: int = 8):
        self.batch, self.frames, self.size, self.device = batch, frames, size, device
        self.groups = math.gcd(batch, photos_per_batch)
        # Each photograph is also kept at half its scale, antialiased, for zooms below 1.
        originals = [photograph(name).to(device) for name, weight in PHOTOGRAPHS.items() for _ in range(weight)]
        halves = [F.interpolate(p[None], scale_factor=0.5, mode="bilinear", antialias=True)[0] for p in originals]
        self.photos = originals + [half for half in halves if min(half.shape[1:]) >= size]

    def uniform(self, clips: int, low: float, high: float) -> Tensor:
        return torch.rand(clips, 1, device=self.device) * (high - low) + low

    def path(self, clips: int, drift: float, sway: float) -> Tensor:
        """A linear drift of up to `drift` a frame plus a sinusoid of up to `sway`; still in a tenth of the clips."""
        t = torch.arange(self.frames, device=self.device)
        rate, phase = self.uniform(clips, 0.1, 0.8), self.uniform(clips, 0, 2 * math.pi)
        moves = self.uniform(clips, 0, 1) > 0.1
        return moves * (
            self.uniform(clips, -drift, drift) * t + self.uniform(clips, -sway, sway) * torch.sin(rate * t + phase)
        )

    def group(self, clips: int) -> Tensor:
        photo = random.choice(self.photos)
        if random.random() < 0.5:
            photo = photo.flip(-1)
        if random.random() < 0.5:
            photo = photo[random.sample(range(3), 3)]
        height, width = photo.shape[1:]
        zoom = torch.exp(self.uniform(clips, math.log(0.9), math.log(2.0)) + self.path(clips, 0.01, 0.02))
        x = self.uniform(clips, 0.1, 0.9) * width + self.path(clips, 4, 6) / zoom
        y = self.uniform(clips, 0.1, 0.9) * height + self.path(clips, 4, 6) / zoom
        quarter_turns = torch.randint(4, (clips, 1), device=self.device) * (math.pi / 2)
        angle = quarter_turns + self.uniform(clips, -0.3, 0.3) + self.path(clips, 0.01, 0.04)
        return camera_crop(photo * 2 - 1, x, y, zoom, angle, self.size)

    def __call__(self) -> Tensor:
        clips = torch.cat([self.group(self.batch // self.groups) for _ in range(self.groups)]) / 2 + 0.5
        # Colours: channels mixed a little by rows that sum to 1 (grey stays grey), tint, moving exposure, gamma.
        mixing = torch.eye(3, device=self.device) + 0.1 * torch.randn(self.batch, 3, 3, device=self.device)
        clips = torch.einsum("bij,bjthw->bithw", mixing / mixing.sum(2, keepdim=True), clips)
        tint = 1 + 0.1 * torch.randn(self.batch, 3, 1, 1, 1, device=self.device)
        exposure = 1 + self.path(self.batch, 0.01, 0.1).view(self.batch, 1, self.frames, 1, 1)
        clips = (clips * tint * exposure).clamp(1e-3, 1)
        clips = clips ** torch.exp(self.uniform(self.batch, -0.5, 0.5)).view(self.batch, 1, 1, 1, 1)
        # A fifth of the clips is a double exposure of two photographs.
        opacity = (torch.rand(self.batch, 1, 1, 1, 1, device=self.device) - 0.8).clamp(min=0) * 2.5
        clips = torch.lerp(clips, clips.roll(self.batch // self.groups, 0), opacity)
        return clips[torch.randperm(self.batch, device=self.device)] * 2 - 1


def reconstruct(vae: AutoencoderKLWan, clip: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
    """Encode, sample and decode with two causal chunks (the first frame, all the others), without the final clamp.

    The model's own loop takes 4 frames a chunk; because it is causal the chunks after the first may be of any length
    with the same result, and two chunks launch a third of the kernels on a 17-frame clip.
    """
    cache: list = [None] * vae._cached_conv_counts["encoder"]
    chunks = [vae.encoder(chunk, feat_cache=cache, feat_idx=[0]) for chunk in (clip[:, :, :1], clip[:, :, 1:])]
    posterior = DiagonalGaussianDistribution(vae.quant_conv(torch.cat(chunks, dim=2)))
    latent = vae.post_quant_conv(posterior.mean + posterior.std * torch.randn_like(posterior.mean))
    cache = [None] * vae._cached_conv_counts["decoder"]
    first = vae.decoder(latent[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
    rest = vae.decoder(latent[:, :, 1:], feat_cache=cache, feat_idx=[0])
    return torch.cat([first, rest], dim=2), posterior


def charbonnier(error: Tensor, knee: float = 0.05) -> Tensor:
    """Quadratic below `knee`, linear above: PSNR's loss for small errors, robust at edges."""
    return (torch.sqrt(error.square() + knee**2) - knee).mean()


def training_loss(vae: AutoencoderKLWan, clip: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """The loss and, for the log, the mean squared error."""
    with torch.autocast(clip.device.type, torch.bfloat16):
        output, posterior = reconstruct(vae, clip)
    error = output.float() - clip
    edges = charbonnier(error.diff(dim=-1)) + charbonnier(error.diff(dim=-2))
    mean, variance, log_variance = posterior.mean.float(), posterior.var.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + variance - 1 - log_variance).mean()
    return charbonnier(error) + 0.1 * edges + kl_weight * kl, error.detach().square().mean()


@torch.no_grad()
def psnr_by_frame(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """PSNR in dB of each frame's reconstruction by the model's own `encode` (posterior mode) and `decode`, peak 2."""
    clip_in = clip.to(vae.device, vae.dtype)
    output = vae.decode(vae.encode(clip_in).latent_dist.mode()).sample
    return 10 * torch.log10(4 / (output.double() - clip.to(vae.device)).square().mean(dim=(0, 1, 3, 4))).cpu()


def evaluate(vae: AutoencoderKLWan) -> dict:
    """PSNR of the clips of every held-out photograph in fp32 (TF32 off) and bf16: the clip's mean and worst frame."""
    scores: dict = {}
    for clip_name, (frames, size) in CLIPS_EVALUATED.items():
        for name in HELD_OUT:
            clip = demo_clip(frames, size, name)
            for dtype in (torch.float32, torch.bfloat16):
                psnr = psnr_by_frame(copy.deepcopy(vae).to(dtype), clip)
                row = {"mean": round(psnr.mean().item(), 3), "worst_frame": round(psnr.min().item(), 3)}
                scores.setdefault(clip_name, {}).setdefault(name, {})[str(dtype).removeprefix("torch.")] = row
    return scores


def best_storage(vae: AutoencoderKLWan) -> torch.dtype:
    """The 16-bit type whose rounding of the weights costs the held-out reconstruction less, computing in fp32."""

    def mean_psnr(dtype: torch.dtype) -> float:
        rounded = copy.deepcopy(vae).to(dtype).float()
        return sum(psnr_by_frame(rounded, demo_clip(name=name)).mean().item() for name in HELD_OUT)

    scores = {dtype: mean_psnr(dtype) for dtype in (torch.float16, torch.bfloat16)}
    typer.echo(f"sum of held-out PSNR by storage: {scores}")
    return max(scores, key=lambda dtype: scores[dtype])


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, clips: Clips, batches: int = 16) -> None:
    """Put the per-channel mean and standard deviation of the training latents into the config."""
    latents = torch.cat(
        [vae.encode(clips()).latent_dist.mode().transpose(0, 1).flatten(1) for _ in range(batches)], dim=1
    )
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in latents.mean(1).tolist()],
        latents_std=[round(v, 4) for v in latents.std(1).tolist()],
    )


def train(
    out: Annotated[Path, typer.Argument(help="folder for weights, config and metrics")],
    minutes: Annotated[float, typer.Option(help="wall-clock budget of the training loop")] = 8.0,
    batch: int = 16,
    frames: Annotated[int, typer.Option(help="frames a clip, 1 + 4k")] = 13,
    size: Annotated[int, typer.Option(help="height and width of a clip, a multiple of 8")] = 112,
    learning_rate: float = 1e-3,
    kl_weight: float = 5e-5,
    seed: int = 0,
    resume: Annotated[Path | None, typer.Option(help="a folder this script wrote")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the training step")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="NDHWC weights and clips")] = False,
) -> None:
    """Train for a wall-clock budget, then measure the held-out photographs and write everything down."""
    diffusers.logging.set_verbosity_error()  # it warns of an empty list of fp32 modules at every cast
    random.seed(seed)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    vae = (AutoencoderKLWan.from_pretrained(resume, torch_dtype=torch.float32) if resume else build_vae()).to(device)
    runs = json.loads((resume / "metrics.json").read_text())["runs"] if resume else []
    if channels_last:
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
    clips = Clips(batch, frames, size, device)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    step_loss = torch.compile(training_loss) if compile else training_loss

    step_loss(vae, clips(), kl_weight)[0].backward()  # compiles, and lets cuDNN choose, outside the time budget
    optimizer.zero_grad(set_to_none=True)
    step, logged, start = 0, 0, time.monotonic()
    log_time = start
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate * min(1, (step + 1) / 200) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
            )
        loss, squared_error = step_loss(vae, clips(), kl_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(vae)
        step += 1
        if step in (1, 20, 50) or step % 200 == 0:
            psnr, now = 10 * math.log10(4 / squared_error.item()), time.monotonic()  # .item() waits for the device
            rate = (step - logged) / (now - log_time)
            typer.echo(
                f"{now - start:6.1f} s  step {step}  loss {loss.item():.4f}  psnr {psnr:.2f} dB  {rate:.2f} steps/s"
            )
            logged, log_time = step, now
    trained_minutes = (time.monotonic() - start) / 60

    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    trained = ema.module.eval()
    measure_latents(trained, clips)
    storage = best_storage(trained)
    trained.to(storage).save_pretrained(out)
    run = {
        "steps": step,
        "minutes": round(trained_minutes, 2),
        "clips_a_step": [batch, frames, size, size],
        "learning_rate": learning_rate,
        "seed": seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    metrics = {
        "psnr_db": evaluate(AutoencoderKLWan.from_pretrained(out, torch_dtype=torch.float32).to(device)),
        "psnr_peak": 2.0,
        "parameters": sum(p.numel() for p in trained.parameters()),
        "storage": str(storage).removeprefix("torch."),
        "photographs": {"trained_on": list(PHOTOGRAPHS), "held_out": HELD_OUT},
        "runs": [*runs, run],
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    typer.echo(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    typer.run(train)
