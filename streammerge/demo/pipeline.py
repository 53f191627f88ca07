"""The demo from end to end: text, base, experts, merges, scores.

    DIR/corpus/       <domain>.train.txt, <domain>.held-out.txt
    DIR/models/       base, expert-code, expert-prose, expert-tables
    DIR/recipes/      one recipe for each method
    DIR/merges/       one model for each recipe, made by `streammerge merge` in a process of its own
    DIR/stages/       what each stage was made from, and its figures
    DIR/results.json  everything that the table shows

Each line but the last is made of stages, and a rerun skips those that are there (stages.py).
"""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from streammerge.demo import corpus, evaluate, recipes, show, train
from streammerge.demo.child import Runner, merge_in_child
from streammerge.demo.stages import Facts, Stages, write_json
from streammerge.errors import StreamMergeError

ARCHITECTURE = train.Architecture()
BASE = train.Schedule(steps=340, matrix_rate=0.02, other_rate=3e-3)
EXPERT = train.Schedule(steps=90, matrix_rate=0.004, other_rate=5e-4, seed=1)
PROMPT = b"If the argument is not a string, "


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo; the defaults take two to three minutes on two CPU cores."""

    architecture: train.Architecture = ARCHITECTURE
    base: train.Schedule = BASE
    expert: train.Schedule = EXPERT
    windows: int = evaluate.WINDOWS
    methods: tuple[str, ...] = tuple(make.__name__ for make in recipes.METHODS)


def run(
    folder: Path,
    *,
    ram: str = "512MiB",
    console: Console | None = None,
    fresh: bool = False,
    settings: Settings | None = None,
    runner: Runner = merge_in_child,
) -> dict[str, Any]:
    """Makes or completes the demo in `folder`, prints its table, and returns what results.json holds.

    `fresh` makes everything again. `runner(recipe, out, ram)` merges and returns the report.
    """
    if importlib.util.find_spec("transformers") is None:
        raise StreamMergeError('demo needs transformers: pip install "streammerge[models]"')
    began = time.perf_counter()
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(Stages(folder, fresh), console or Console(), settings or Settings(), ram, runner)
    with train.quiet(), train.few_threads():
        results = demo.results()
    results |= {"seconds": time.perf_counter() - began, "reused": demo.stages.reused}
    write_json(folder / "results.json", results)
    show.print_results(demo.console, results)
    return results


@dataclass(frozen=True)
class Demo:
    """One run of the demo: where, how large, how loud."""

    stages: Stages
    console: Console
    settings: Settings
    ram: str
    runner: Runner

    def results(self) -> dict[str, Any]:
        """All stages in order; what results.json holds but for the time it took."""
        domains = self._corpus()
        made = self._models(domains)
        made |= self._merges({name: facts["key"] for name, facts in made.items()})
        rows = [self._row(name, facts, domains) for name, facts in made.items()]
        best = min((row for row in rows if row["kind"] == "merge"), key=lambda row: float(row["mean"]))
        return {
            "domains": list(domains),
            "rows": rows,
            "best": best["name"],
            "finding": show.finding(rows, list(domains), best["name"]),
            "sample": self._sample(best),
            "ram": self.ram,
            "settings": asdict(self.settings),
            "versions": _versions(),
        }

    def _corpus(self) -> dict[str, corpus.Domain]:
        def make(folder: Path) -> Facts:
            folder.mkdir()
            domains = corpus.gather()
            for domain in domains.values():
                (folder / f"{domain.name}.train.txt").write_bytes(domain.train)
                (folder / f"{domain.name}.held-out.txt").write_bytes(domain.held_out)
            return {"bytes": {name: len(domain.train) for name, domain in domains.items()}}

        with self._timed("corpus") as note:
            facts = self.stages.run("corpus", {"python": platform.python_version()}, make, "corpus")
            note += [f"{sum(facts['bytes'].values()) / 1e6:.1f} MB of text for training"]
        folder = self.stages.folder / "corpus"
        return {
            name: corpus.Domain(
                name,
                (folder / f"{name}.train.txt").read_bytes(),
                (folder / f"{name}.held-out.txt").read_bytes(),
            )
            for name in corpus.DOMAINS
        }

    def _models(self, domains: dict[str, corpus.Domain]) -> dict[str, Facts]:
        """The base, trained on all domains, and one expert from it for each."""
        texts = [domain.train for domain in domains.values()]
        settings: dict[str, Any] = {
            "architecture": asdict(self.settings.architecture),
            "schedule": asdict(self.settings.base),
            "text": [domain.digest for domain in domains.values()],
        }
        made = {"base": self._train("base", settings, None, texts, self.settings.base)}
        start = self.stages.folder / str(made["base"]["folder"])
        for name, domain in domains.items():
            settings = {
                "from": made["base"]["key"],
                "schedule": asdict(self.settings.expert),
                "text": domain.digest,
            }
            facts = self._train(f"expert-{name}", settings, start, [domain.train], self.settings.expert)
            made[f"expert:{name}"] = facts
        return made

    def _train(
        self,
        name: str,
        settings: dict[str, Any],
        start: Path | None,
        texts: list[bytes],
        schedule: train.Schedule,
    ) -> Facts:
        def make(folder: Path) -> Facts:
            began = time.perf_counter()
            model = train.load_model(start) if start else train.new_model(self.settings.architecture, schedule.seed)
            with show.training_bar(self.console, name, schedule.steps) as tick:
                train.train(model, texts, schedule, tick)
            train.save_model(model, folder)
            return {"seconds": time.perf_counter() - began}

        with self._timed(name) as note:
            facts = self.stages.run(name, settings, make, f"models/{name}")
            note += [f"{schedule.steps} steps, {schedule.steps * schedule.batch * schedule.window:,} bytes"]
        kind = "base" if start is None else "expert"
        return {**facts, "kind": kind, "folder": f"models/{name}", "key": self.stages.key(name, settings)}

    def _merges(self, models: dict[str, str]) -> dict[str, Facts]:
        """Every recipe through the command line, under the budget."""
        folder = self.stages.folder
        paths = recipes.write_recipes(
            folder / "recipes", corpus.DOMAINS, self.settings.architecture.layers, self.settings.methods
        )
        made: dict[str, Facts] = {}
        for method, path in paths.items():

            def make(out: Path, path: Path = path) -> Facts:
                return {"report": self.runner(path, out, self.ram)}

            settings = {"recipe": path.read_text("utf-8"), "models": models, "ram": self.ram}
            with self._timed(f"merge {method}") as note:
                facts = self.stages.run(f"merge-{method}", settings, make, f"merges/{method}")
                note += [f"peak {facts['report']['ram_peak_bytes'] / show.MIB:.0f} MiB of {self.ram}"]
            key = self.stages.key(f"merge-{method}", settings)
            made[method] = {**facts["report"], "kind": "merge", "folder": f"merges/{method}", "key": key}
        return made

    def _row(self, name: str, facts: Facts, domains: dict[str, corpus.Domain]) -> dict[str, Any]:
        """The scores of one model beside what it cost to make."""

        def make(_: Path) -> Facts:
            model = train.load_model(self.stages.folder / str(facts["folder"]))
            return {
                "bits": {
                    domain.name: evaluate.bits_per_byte(model, domain.held_out, self.settings.windows)
                    for domain in domains.values()
                }
            }

        settings = {
            "model": facts["key"],
            "windows": self.settings.windows,
            "text": [domain.digest for domain in domains.values()],
        }
        with self._timed(f"score {name}") as note:
            bits = self.stages.run(f"score-{name.replace(':', '-')}", settings, make)["bits"]
            mean = sum(bits.values()) / len(bits)
            note += [f"{mean:.3f} bits per byte"]
        return {
            "name": name,
            "kind": facts["kind"],
            "folder": facts["folder"],
            "bits": bits,
            "mean": mean,
            "ram_peak_bytes": facts.get("ram_peak_bytes"),
            "seconds": facts["seconds"],
            "predicted": facts.get("predicted"),
        }

    def _sample(self, best: dict[str, Any]) -> dict[str, str]:
        """A prompt continued by the best merge."""
        model = train.load_model(self.stages.folder / str(best["folder"]))
        text = PROMPT + evaluate.continue_prompt(model, PROMPT)
        return {"prompt": PROMPT.decode(), "text": show.printable(text.decode("utf-8", "replace"))}

    @contextmanager
    def _timed(self, name: str) -> Iterator[list[str]]:
        """One line for each stage: its name, what the body notes, its seconds or that it was there."""
        began, before, note = time.perf_counter(), len(self.stages.reused), list[str]()
        yield note
        there = len(self.stages.reused) > before
        took = "there already" if there else f"{time.perf_counter() - began:.1f} s"
        show.say(self.console, f"{name}: {', '.join([*note, took])}")


def _versions() -> dict[str, str]:
    """Of what the figures depend on."""
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **packages}
