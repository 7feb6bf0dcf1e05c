"""README's tables say what the code and the committed results say."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vae_accel import platforms, results

ROOT = Path(__file__).parents[1]


def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tables_are_current():
    text = (ROOT / "README.md").read_text()
    assert tables().fill(text) == text, "run python scripts/readme_tables.py"


def test_missing_markers_are_told():
    with pytest.raises(ValueError, match="results"):
        tables().fill("<!-- settings -->\n<!-- /settings -->\n")


@pytest.mark.parametrize("platform", platforms.ALL)
def test_results_pass_their_schema_and_their_proof(platform):
    for result in results.load(ROOT / "platforms" / platform / "results"):
        assert result.platform == platform
        assert result.rewrites and result.proof and result.speed
        for row in result.proof:
            assert row.tier in ("exact", "rounding"), "the default plan is what is committed"
            assert row.identical or row.rms_ratio <= 1.06
