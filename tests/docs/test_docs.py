"""The documents say what the code does: tables, commands, paths, the worked example.

`python tests/docs/test_docs.py` writes the generated tables of README.md and docs/architecture.md anew.
"""

import ast
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from streammerge import api
from streammerge import method as methods
from streammerge.budget import MIB, human
from streammerge.cli import COMMANDS, cli

ROOT = Path(__file__).parents[2]
DOCS = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/atlas.md",
    "docs/fda.md",
    "docs/gradfix.md",
    "docs/matrix_methods.md",
    "benchmarks/README.md",
    "benchmarks/LOG.md",
]
BANNED = (
    *("session", "helper", "sandbox", "assistant", "language model wrote", "the brief", "specs/", "design.md"),
    *("style.md", "/work/", "/tmp/", "/root/", "/home/", "localhost", "pip index", "--index-url"),
    *("blazing", "seamless", "powerful", "cutting-edge", "state-of-the-art", "effortless", "lightning", "robust"),
)
MADE = ("OUT", "DIR", "model", "adapter_", "config.json", "journal.jsonl", "streammerge.json", "tokenizer", "org/")
EXAMPLE_VALUES = {"weight": (0.6, 0.4), "density": (0.5, 0.3), "t": 0.3}
SHAPE, TILE, THREADS = (4096, 4096), 4 * MIB, 2


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def between(name: str, mark: str) -> str:
    """What stands between <!-- mark --> and <!-- /mark -->."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", text(name), re.DOTALL)
    assert found, f"{name} has no <!-- {mark} --> ... <!-- /{mark} -->"
    return found[1]


# --- generated tables ---


def example_of(name: str) -> tuple[methods.TileMethod, int]:
    """A method with ordinary parameters, and how many experts it gets; a post-processing after task_arithmetic."""
    if name in methods.posts():
        before, experts = example_of("task_arithmetic")
        after = methods.build(methods.find_post(name), {"of": before})
        assert isinstance(after, methods.TileMethod)
        return after.for_tensor("w", SHAPE, experts), experts
    cls = methods.find(name)
    known = methods.parameters(cls)
    experts = min(2, cls.max_experts or 2)
    values = {key: value for key, value in EXAMPLE_VALUES.items() if key in known}
    values = {key: value[:experts] if isinstance(value, tuple) else value for key, value in values.items()}
    made = methods.build(cls, values)
    assert isinstance(made, methods.TileMethod)
    return made, experts


def sees_and_holds(name: str) -> tuple[str, str]:
    """Whether the whole tensor is surveyed first, and the bytes beside inputs and results."""
    if name not in methods.posts() and methods.find(name).sees == "layer":
        reads = "with samples" if "data" in methods.find(name).keys else "without data"
        return f"layers, {reads}", "see its plan"
    made, experts = example_of(name)
    surveyed = made.survey(SHAPE, experts) is not None
    held = made.cost(TILE, experts, "cpu").host * THREADS
    held += made.survey_bytes(SHAPE, experts, THREADS) if surveyed else 0
    sees = "tile, after a survey of the tensor" if surveyed else "tile"
    return "whole matrices" if made.sees == "tensor" else sees, human(held) if held else "0"


def parameter(row: dict) -> str:
    star = "*" if row["per_expert"] else ""
    value = "needed" if row["required"] else str(row["default"]).lower()
    return f"`{row['name']}`{star} {value}"


def methods_table() -> str:
    rows = []
    for row in api.describe_methods():
        least, most = row["models"]
        models = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        if row["base_model"] == "needed":
            models = "any method's + base" if row["post"] else f"{models} + base"
        elif not methods.find(row["name"]).base_is_expert:
            models += " (+ base)"
        parameters = ", ".join(map(parameter, row["parameters"]))
        sees, holds = sees_and_holds(row["name"])
        named = f"`post: {row['name']}`" if row["post"] else f"`{row['name']}`"
        rows.append([named, row["source"], models, sees, parameters, holds])
    return table(["method", "source", "models", "must see", "parameters and defaults", "holds"], rows)


def commands_table() -> str:
    rows = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        arguments = [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]
        options = [max(p.opts, key=len) for p in command.params if isinstance(p, click.Option)]
        said = " ".join(command.help.split("\n\n")[0].split())
        rows.append([f"`{' '.join([name, *arguments])}`", said, " ".join(f"`{option}`" for option in options)])
    return table(["command", "what it does", "options"], rows)


def may_use() -> dict[str, str]:
    """The table of tests/test_architecture.py, without running that file."""
    tree = ast.parse(text("tests/test_architecture.py"))
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MAY_USE"]
    return ast.literal_eval(values[0])


def imports_table() -> str:
    return table(
        ["layer", "may import"], [[f"`{layer}`", uses or "nothing of ours"] for layer, uses in may_use().items()]
    )


GENERATED = {
    ("README.md", "methods"): methods_table,
    ("README.md", "commands"): commands_table,
    ("docs/architecture.md", "imports"): imports_table,
}


@pytest.mark.parametrize(("name", "mark"), GENERATED)
def test_generated_tables_are_fresh(name, mark):
    assert between(name, mark) == GENERATED[name, mark](), "run: python tests/docs/test_docs.py"


# --- what documents name ---


@pytest.mark.parametrize("name", DOCS)
def test_paths_exist(name):
    """Whatever looks like a path of this repository, in a link or in code marks."""
    named = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text(name)) + re.findall(r"`([\w./-]+)`", text(name))
    for path in named:
        looks = "://" not in path and ("/" in path or path.endswith((".py", ".md", ".toml", ".txt")))
        if not looks or path.startswith(MADE):
            continue
        places = (
            ROOT / path,
            ROOT / name.rpartition("/")[0] / path,
            ROOT / "streammerge" / path,
            ROOT / "tests" / path,
        )
        assert any(place.exists() for place in places), f"{name} names {path}"


def commands_in(name: str) -> list[str]:
    blocks = re.findall(r"```(?:console|sh)\n(.*?)```", text(name), re.DOTALL)
    lines = [line.removeprefix("$ ").partition("  #")[0] for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("streammerge ", "make ", "python "))]


@pytest.mark.parametrize(("name", "line"), [(name, line) for name in DOCS for line in commands_in(name)])
def test_commands_are_real(name, line):
    program, *words = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE)
        assert all(word in targets for word in words)
    elif program == "python":
        script = text(words[0])
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in script, f"{words[0]} has no {option}"
    else:
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None, f"no command {words[0]}"
        values, left, _ = command.make_parser(click.Context(command)).parse_args(words[1:])
        assert not left, left
        for param in command.params:
            if isinstance(param, click.Argument) and param.required:
                assert values.get(param.name) is not None, f"{line}: no {param.name}"


def test_the_readme_shows_every_command():
    shown = {line.split()[1] for line in commands_in("README.md") if line.startswith("streammerge ")}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("name", DOCS)
def test_the_project_speaks_of_itself_alone(name):
    found = text(name).lower()
    assert not [word for word in BANNED if word in found]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(name), re.DOTALL)


def test_recipes_are_accepted():
    from streammerge.planner.recipe import parse

    assert len(blocks("README.md", "yaml")) >= 3
    for recipe in (block for name in DOCS for block in blocks(name, "yaml")):
        parse(recipe)


def test_python_blocks_parse():
    for name in DOCS:
        for block in blocks(name, "python"):
            ast.parse(block)


def test_the_worked_method_of_contributing_is_right(tmp_path, monkeypatch):
    """The file that CONTRIBUTING.md tells people to write keeps the first contract: its own examples."""
    import importlib

    import numpy as np
    from merging import run

    (source,) = (block for block in blocks("CONTRIBUTING.md", "python") if "EXAMPLES" in block)
    (tmp_path / "worked_example.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("worked_example")
    for instance, base, experts, wanted in module.EXAMPLES:
        out, _ = run(instance, np.float32(base), [np.float32(e) for e in experts])
        np.testing.assert_allclose(out, wanted, rtol=1e-6)
    (cls,) = {type(example[0]) for example in module.EXAMPLES}
    assert cls.summary
    assert all(param.meaning for param in methods.parameters(cls).values())


def main() -> None:
    for (name, mark), make in GENERATED.items():
        path = ROOT / name
        old = f"<!-- {mark} -->\n{between(name, mark)}\n<!-- /{mark} -->"
        path.write_text(text(name).replace(old, f"<!-- {mark} -->\n{make()}\n<!-- /{mark} -->"), "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main()
