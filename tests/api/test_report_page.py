"""The HTML page of a merge: one file, the figures of the manifest, plots of what methods said."""

import json
import re
import xml.etree.ElementTree as ET

import build
import numpy as np
import pytest

import streammerge as sm
from streammerge.api import plots
from streammerge.errors import CheckpointError, MachineError


@pytest.fixture
def merged(tmp_path):
    rng = np.random.default_rng(1)
    base = {
        f"layers.{i}.{kind}.weight": rng.normal(size=(12, 20)).astype(np.float32) for i in range(3) for kind in "qk"
    }
    models = {"base<&>": base}
    for name in "ab":
        models[name] = {key: (w + 0.1 * rng.normal(size=w.shape)).astype(np.float32) for key, w in base.items()}
    for name, tensors in models.items():
        build.checkpoint(tmp_path / name, {"model.safetensors": tensors})
    recipe = build.recipe(tmp_path / "r.json", "tsvm", [tmp_path / "a", tmp_path / "b"], tmp_path / "base<&>")
    sm.merge(recipe, tmp_path / "out")
    return tmp_path / "out"


def test_the_page_stands_alone_and_holds_the_manifests_figures(merged):
    path = sm.report(merged)
    assert path == merged / "report.html"
    text = path.read_text(encoding="utf-8")
    manifest = json.loads((merged / "streammerge.json").read_bytes())
    for known in (manifest["digest"], *manifest["shards"].values(), "base&lt;&amp;&gt;", "layers.*.q.weight"):
        assert known in text
    figures = manifest["report"]["matrices"]["layers.2.k.weight"]
    assert f"{figures['displacement']:.4g}" in text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", text), "nothing is fetched"
    drawn = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawn) == 2, "memory, matrices"
    for each in drawn:
        ET.fromstring(each.replace("xlink:", ""))
    assert sm.verify(merged)["bad"] == []


def test_elsewhere_and_where_it_cannot_be(merged, tmp_path):
    assert sm.report(merged, tmp_path / "page.html").is_file()
    assert not (merged / "report.html").exists()
    with pytest.raises(MachineError, match="--to"):
        sm.report(merged, tmp_path / "none" / "page.html")
    with pytest.raises(CheckpointError, match="streammerge wrote"):
        sm.report(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.12.mlp.up.weight", (12, "model.layers.*.mlp.up.weight")),
        ("h.0.attn.weight", (0, "h.*.attn.weight")),
        ("lm_head.weight", (7, "lm_head.weight")),
        ("a.1.experts.3.w", (1, "a.*.experts.3.w")),
    ],
)
def test_depth_comes_from_the_name(name, told):
    assert plots.depth_of(name, 7) == told
