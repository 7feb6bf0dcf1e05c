#!/usr/bin/env bash
# Lints, checks types and runs every test. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/setup.sh" dev
ruff check .
ruff format --check .
mypy vae_accel
python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --quiet "$@"
