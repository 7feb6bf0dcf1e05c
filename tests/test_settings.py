from __future__ import annotations

from pathlib import Path

import pytest

from vae_accel import Tier, settings
from vae_accel.rewrites import NAMES
from vae_accel.settings import PREFIX, SettingsError, read, table


def test_defaults():
    given = read(NAMES)
    assert (given.platform, given.tier, given.strict, given.bf16) == ("auto", "rounding", False, False)
    assert given.switches == dict.fromkeys(NAMES, "auto")


def test_the_environment_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv("VAE_ACCEL_TIER", "exact")
    monkeypatch.setenv("VAE_ACCEL_BF16", "1")
    monkeypatch.setenv("VAE_ACCEL_CONV3D_AS_CONV2D", "0")
    given = read(NAMES)
    assert (given.tier, given.bf16, given.switches["conv3d_as_conv2d"]) == ("exact", True, "0")
    monkeypatch.delenv("VAE_ACCEL_TIER")
    assert read(NAMES).tier == "rounding"


def test_a_keyword_wins_over_a_variable(monkeypatch):
    monkeypatch.setenv("VAE_ACCEL_PLATFORM", "rocm")
    monkeypatch.setenv("VAE_ACCEL_CHANNELS_LAST", "1")
    assert read(NAMES, platform="npu", channels_last="0").platform == "npu"
    assert read(NAMES, channels_last=False).switches["channels_last"] == "0"
    assert read(NAMES, platform=None, channels_last=None).platform == "rocm"


def test_a_tier_may_be_given_as_the_enum():
    assert read(NAMES, tier=Tier.EXACT).tier == "exact"


@pytest.mark.parametrize("value, text", [(True, "1"), (False, "0"), ("auto", "auto")])
def test_switches_take_booleans(value, text):
    assert read(NAMES, channels_last=value).switches["channels_last"] == text


OTHERS = (
    "platform",
    "tier",
    "strict",
    "bf16",
    "half_operands",
    "tiles",
    "graph_keep",
    "graph_budgets",
    "graph_pool_mib",
)
WRONG = {
    "platform": ("tpu", "auto, cuda, rocm, npu, cpu"),
    "tier": ("lossless", "exact, rounding, lowered"),
    "strict": ("perhaps", "0, 1"),
    "bf16": ("fp8", "0, 1"),
    "conv3d_as_conv2d": ("true", "auto, 0, 1"),
    "graph_keep": ("0", "a number from 1"),
    "graph_budgets": ("256,", "numbers with commas between"),
    "graph_pool_mib": ("2G", "a number from 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_value_names_the_choices(name, monkeypatch):
    value, choices = WRONG[name]
    with pytest.raises(SettingsError, match=f"{name}='{value}': choose one of {choices}"):
        read(NAMES, **{name: value})
    monkeypatch.setenv(PREFIX + name.upper(), value)
    with pytest.raises(SettingsError, match=f"{PREFIX}{name.upper()}='{value}': choose one of {choices}"):
        read(NAMES)


def test_budgets_are_numbers(monkeypatch):
    assert read(NAMES).graph_budgets == (256, 512, 1024, 1536)
    assert read(NAMES, graph_budgets=(64, 128), graph_keep=2).graph_budgets == (64, 128)
    monkeypatch.setenv("VAE_ACCEL_GRAPH_BUDGETS", "32")
    assert read(NAMES).graph_budgets == (32,)


def test_an_unknown_name_names_those_that_exist(monkeypatch):
    with pytest.raises(SettingsError, match=r"conv3d is not a setting; there are: .*conv3d_as_conv2d"):
        read(NAMES, conv3d="1")
    monkeypatch.setenv("VAE_ACCEL_CONV3D", "1")
    with pytest.raises(
        SettingsError, match=r"VAE_ACCEL_CONV3D is not a setting; there are: .*VAE_ACCEL_CONV3D_AS_CONV2D"
    ):
        read(NAMES)


def test_an_empty_variable_is_no_value(monkeypatch):
    monkeypatch.setenv("VAE_ACCEL_TIER", "")
    assert read(NAMES).tier == "rounding"


def test_the_table_lists_every_variable_with_its_value_now(monkeypatch):
    monkeypatch.setenv("VAE_ACCEL_STRICT", "1")
    rows = {row.name: row for row in table(NAMES)}
    assert list(rows) == [PREFIX + n.upper() for n in (*OTHERS, *NAMES)]
    assert (rows["VAE_ACCEL_STRICT"].value, rows["VAE_ACCEL_STRICT"].default) == ("1", "0")
    assert rows["VAE_ACCEL_TIER"].choices == "exact, rounding, lowered"
    assert all(row.meaning and row.choices for row in rows.values())


def test_the_tiles_are_in_the_users_cache_or_where_they_are_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read(NAMES).tiles == tmp_path / "vae-accel" / "tiles.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert read(NAMES).tiles == Path.home() / ".cache" / "vae-accel" / "tiles.json"
    monkeypatch.setenv("VAE_ACCEL_TILES", "~/mine.json")
    assert read(NAMES).tiles == Path.home() / "mine.json"
    assert read(NAMES, tiles=tmp_path / "other.json").tiles == tmp_path / "other.json"


def test_every_rewrite_has_a_switch_and_every_switch_a_rewrite():
    import importlib
    import pkgutil

    import vae_accel.rewrites as rewrites
    from vae_accel.rewrite import Rewrite

    for found in pkgutil.iter_modules(rewrites.__path__):
        importlib.import_module(f"vae_accel.rewrites.{found.name}")
    assert {cls.name for cls in Rewrite.__subclasses__() if cls.__module__.startswith("vae_accel.")} == set(NAMES)


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        settings.read(NAMES).tier = "lowered"
