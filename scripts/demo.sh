#!/usr/bin/env bash
# Decodes a real clip with the embedded VAE, stock and optimized: times, PSNR, a picture. Arguments go to `vae-accel demo`.
set -euo pipefail
. "$(dirname "$0")/setup.sh" encoders
vae-accel demo "$@"
