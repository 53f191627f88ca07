"""Parameter values per tensor. They are those that mergekit 0.1.5 plans for the same recipe."""

import pytest
from stand_ins import MODELS, TIES, jobs


@pytest.mark.parametrize(
    ("name", "weight", "density", "normalize", "scale"),
    [
        ("model.embed_tokens.weight", (0.0, 0.5), (0.3, 0.3), False, 0.25),
        ("model.norm.weight", (0.0, 0.001), (0.3, 0.3), False, 1.5),
        ("lm_head.weight", (0.0, 0.5), (0.3, 0.3), False, 2.0),  # after the layers, and still at t = 0
        ("model.layers.0.self_attn.q_proj.weight", (0.0, 0.5), (0.9, 0.3), False, 1.5),
        ("model.layers.0.mlp.up_proj.weight", (0.0, 0.5), (0.2, 0.3), False, 1.5),
        ("model.layers.1.self_attn.q_proj.weight", (0.2, 0.5), (0.9, 0.39999999999999997), False, 1.5),
        (
            "model.layers.1.mlp.up_proj.weight",
            (0.2, 0.5),
            (0.30000000000000004, 0.39999999999999997),
            False,
            1.5,
        ),
        ("model.layers.2.mlp.up_proj.weight", (0.4, 0.5), (0.4, 0.5), True, 1.5),
        ("model.layers.2.input_layernorm.weight", (0.4, 0.001), (0.5, 0.5), True, 1.5),
        ("model.layers.3.input_layernorm.weight", (0.7, 0.125), (0.5999999999999999,) * 2, True, 1.5),
        ("model.layers.4.mlp.up_proj.weight", (1.0, 0.5), (0.6, 0.7), True, 1.5),
    ],
)
def test_parameters_of_models(
    name: str, weight: tuple[float, ...], density: tuple[float, ...], normalize: bool, scale: float
) -> None:
    job = jobs(TIES)[name]
    assert job.parameters == {"weight": weight, "density": density, "normalize": normalize, "lambda": scale}
    assert job.base is not None
    assert [spec.file.split("/")[2] for spec in (job.base, *job.experts)] == ["A", "B", "C"]
    assert job.method == "ties"


LINEAR = """
merge_method: linear
slices:
  - sources:
      - {model: A, layer_range: [0, 3], parameters: {weight: [1, 0]}}
      - model: B
        layer_range: [2, 5]
        parameters: {weight: [{filter: layers.2., value: 0.2}, {filter: layers.4.mlp, value: [5, 6]}]}
    parameters: {weight: 0.75}
  - sources:
      - {model: C, layer_range: [4, 5]}
    parameters: {weight: [0.1, 0.9], normalize: false}
  - sources:
      - {model: B, layer_range: [1, 3]}
      - {model: C, layer_range: [0, 2], parameters: {weight: {filter: lm_head, value: 4}}}
parameters: {weight: [0, 10]}
"""


@pytest.mark.parametrize(
    ("name", "experts", "weight", "normalize"),
    [
        ("model.embed_tokens.weight", "A: B:", (1.0, 0.75), True),
        ("model.layers.0.mlp.up_proj.weight", "A:0 B:2", (1.0, 0.2), True),  # the filter sees B's own number
        ("model.layers.1.mlp.up_proj.weight", "A:1 B:3", (0.5, 0.75), True),
        ("model.layers.2.mlp.up_proj.weight", "A:2 B:4", (0.0, 6.0), True),
        ("model.layers.2.self_attn.q_proj.weight", "A:2 B:4", (0.0, 0.75), True),
        ("model.layers.3.mlp.up_proj.weight", "C:4", (0.9,), False),  # the only layer of its slice: t = 1
        ("model.layers.4.mlp.up_proj.weight", "B:1 C:0", (0.0, 0.0), True),
        ("model.layers.5.mlp.up_proj.weight", "B:2 C:1", (10.0, 10.0), True),
        ("model.norm.weight", "B: C:", (0.0, 0.0), True),
        ("lm_head.weight", "B: C:", (0.0, 4.0), True),
    ],
)
def test_parameters_of_slices(name: str, experts: str, weight: tuple[float, ...], normalize: bool) -> None:
    job = jobs(LINEAR)[name]
    layer = [spec.name.split(".")[2] if "layers" in spec.name else "" for spec in job.experts]
    models = [spec.file.split("/")[2] for spec in job.experts]
    assert " ".join(f"{model}:{number}" for model, number in zip(models, layer, strict=True)) == experts
    assert job.parameters == {"weight": weight, "normalize": normalize, "rounds": 1}
    assert job.base is None


def test_slerp_follows_the_published_example() -> None:
    found = jobs("""
    merge_method: slerp
    base_model: A
    models: [{model: B}, {model: A}]
    parameters:
      t:
        - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
        - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
        - value: 0.5
    """)
    layers = [f"model.layers.{i}" for i in range(5)]
    assert [found[f"{at}.self_attn.q_proj.weight"].parameters["t"] for at in layers] == [
        0.0,
        0.5,
        0.3,
        0.7,
        1.0,
    ]
    assert [found[f"{at}.mlp.up_proj.weight"].parameters["t"] for at in layers] == [1.0, 0.5, 0.7, 0.3, 0.0]
    assert found["lm_head.weight"].parameters == {"t": 0.5}
    assert [spec.file.split("/")[2] for spec in found["lm_head.weight"].experts] == ["B"]


def test_a_slice_may_have_its_own_base() -> None:
    found = jobs("""
    merge_method: ties
    base_model: A
    slices:
      - sources: [{model: B, layer_range: [0, 3]}, {model: C, layer_range: [2, 5]}]
        base_model: C
        parameters: {weight: [0.5, 1.0], density: 0.5}
      - sources: [{model: A, layer_range: [3, 5]}, {model: C, layer_range: [2, 4]}]
        parameters: {lambda: 2}
    parameters: {weight: 3, lambda: [0, 1]}
    """)
    second, fourth = (found[f"model.layers.{i}.self_attn.q_proj.weight"] for i in (1, 3))
    assert second.parameters == {"weight": (0.75,), "density": (0.5,), "normalize": True, "lambda": 0.5}
    assert fourth.parameters == {"weight": (3.0,), "density": (1.0,), "normalize": True, "lambda": 2.0}
    assert second.base == MODELS["C"].tensors["model.layers.3.self_attn.q_proj.weight"]
    assert fourth.base == MODELS["A"].tensors["model.layers.3.self_attn.q_proj.weight"]
