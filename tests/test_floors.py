"""Imports run downward only, importing the package is cheap, and one file alone reads the environment."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vae_accel"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 320
FLOORS = (
    {"settings", "metrics", "kernels", "storage"},
    {"edits", "derived", "rewrite"},
    {"families", "parallel"},
    {"graphs"},
    {"rewrites"},
    {"platforms"},
    {"reports", "api", "streaming"},
    {"verify", "workloads", "bench", "calls", "timing", "reports", "results", "profiling", "demo", "tuning"},
    {"cli"},
)
ROOT = {"__init__", "__main__"}


def floor(room: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), -1)


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(file: Path) -> str:
    parts = ("vae_accel", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named(file: Path, node: ast.AST) -> list[str]:
    """The dotted names that one import statement brings in; none for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ".".join(("vae_accel", *file.relative_to(PACKAGE).parts)[: -node.level]) if node.level else ""
    source = ".".join(filter(None, (package, node.module)))
    return [f"{source}.{alias.name}" for alias in node.names]


def imports(file: Path) -> list[tuple[str, int]]:
    """Every module imported anywhere in a file, functions included: (dotted name, line)."""
    return [(name, node.lineno) for node in ast.walk(parse(file)) for name in named(file, node)]


def at_import(file: Path) -> list[str]:
    """The modules a file imports when it is itself imported: not those inside functions or under TYPE_CHECKING."""
    nodes: list[ast.AST] = list(parse(file).body)
    found = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found += named(file, node)
        nodes += ast.iter_child_nodes(node)
    return found


@functools.cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


each_file = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))


@each_file
def test_imports_run_downward(file):
    here = room(file)
    if here in ROOT:
        return
    assert floor(here) >= 0, f"{here} is on no floor: name one in {Path(__file__).name}"
    for name, line in imports(file):
        parts = name.split(".")
        if parts[0] != "vae_accel" or parts[1] in (here, "__version__"):
            continue
        assert floor(parts[1]) >= 0, f"line {line}: {name} is on no floor"
        assert floor(parts[1]) <= floor(here), f"line {line}: {here} is below {name}"


@each_file
def test_rewrites_never_import_each_other(file):
    if room(file) != "rewrites" or file.stem == "__init__":
        return
    siblings = [name for name, _ in imports(file) if name.startswith("vae_accel.rewrites.")]
    assert not [s for s in siblings if not s.startswith(module(file))]


@each_file
def test_triton_is_imported_by_kernels_alone_and_lazily(file):
    assert "triton" not in {name.split(".")[0] for name in at_import(file)}
    if room(file) not in ("kernels", "cli", "bench", "verify"):  # the last three print its version
        assert "triton" not in {name.split(".")[0] for name, _ in imports(file)}


@each_file
def test_settings_alone_reads_the_environment(file):
    if module(file) == "vae_accel.settings":
        return
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("os.environ", "os.getenv", "os.environb"), f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"} & {alias.name for alias in node.names}, f"line {node.lineno}"


@each_file
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= LONGEST


@each_file
def test_nothing_is_left_to_do_and_nothing_is_swallowed(file):
    source = file.read_text()
    assert not [word for word in ("TODO", "FIXME", "XXX") if word in source]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (broad and isinstance(node.body[-1], ast.Pass)), f"line {node.lineno}: swallows everything"


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after `statement`."""
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_cheap():
    assert not {"torch", "diffusers", "transformers", "triton"} & loaded_by("import vae_accel")


def test_the_public_names_load_no_model_library_and_start_no_cuda_context():
    names = "optimize, optimize_vae, optimize_encoder, restore, paused, report, warmup, platforms, metrics, settings"
    loaded = loaded_by(f"from vae_accel import {names}; import torch; assert not torch.cuda.is_initialized()")
    assert not {"diffusers", "transformers", "triton", "einops"} & loaded


def test_every_public_name_exists():
    import vae_accel

    for name in vae_accel.__all__:
        assert getattr(vae_accel, name) is not None and name in dir(vae_accel)
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = vae_accel.optimise
