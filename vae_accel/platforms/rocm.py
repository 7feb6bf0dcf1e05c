"""Placeholder table."""

from vae_accel.platforms.base import Platform, Step
from vae_accel.rewrites.conv3d_as_conv2d import Conv3dAsConv2d


class Rocm(Platform):
    name = "rocm"
    vae = (Step(Conv3dAsConv2d(), "off", "unmeasured"),)
