"""The import table is the architecture; every layer has a row, every import stays within it."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "streammerge"
MAY_USE = {
    "errors": "",
    "kernels": "",
    "budget": "errors",
    "formats": "errors",
    "kernel": "errors kernels",
    "store": "errors budget formats",
    "method": "errors formats kernels",
    "methods": "errors kernel kernels method",
    "models": "errors",
    "samples": "errors",
    "planner": "errors budget formats kernel store method",
    "engine": "errors budget formats store method models planner kernel kernels",
    "api": "errors budget formats store method samples models planner engine demo",
    "demo": "errors budget",
    "compat": "errors api planner",
    "cli": "errors budget api",
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> list[str]:
    """Every module of ours that a file imports, at the top or inside functions."""
    found = []
    package = ".".join(("streammerge", *path.relative_to(PACKAGE).parts[:-1]))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], module]).strip(".")
            if module in ("streammerge", "streammerge.kernels"):
                found += [f"{module}.{alias.name}" for alias in node.names]
            else:
                found.append(module)
    return [name for name in found if name.split(".")[0] == "streammerge"]


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem not in ("__init__", "__main__"))
FILES += sorted((PACKAGE / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", sorted(set(FILES)), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = {layer, *MAY_USE[layer].split(), "__version__"}
    for module in imports(path):
        assert layer_of(module) in allowed, f"{path}: {layer} must not use {module}"


def test_the_table_has_no_row_without_a_layer():
    layers = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    assert set(MAY_USE) - layers - {"models", "compat"} == set()


def test_the_table_has_no_cycle():
    done: set[str] = set()
    while len(done) < len(MAY_USE):
        ready = {layer for layer, uses in MAY_USE.items() if layer not in done and set(uses.split()) <= done}
        assert ready, f"a cycle among {set(MAY_USE) - done}"
        done |= ready


def test_kernels_is_no_package_of_ours():
    """A regular package `kernels` at the root would shadow the distribution that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_the_command_line_does_not_import_torch():
    """Start-up and the memory of a CPU merge depend on it."""
    import subprocess
    import sys

    code = "import sys, streammerge.api, streammerge.cli.merging, streammerge.method as m; "
    code += "[m.find(n) for n in m.names()]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version_is_one():
    import streammerge

    assert f'\nversion = "{streammerge.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_public_names_resolve():
    import streammerge

    for name in streammerge.__all__:
        assert getattr(streammerge, name) is not None
