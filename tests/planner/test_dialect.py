"""Recipes against checkpoints: order, layout, copies, and what does not fit."""

from dataclasses import replace

import pytest
from stand_ins import CONFIG, MODELS, TIES, checkpoint, jobs, llama, plan, refused

from streammerge.errors import CheckpointError, RecipeError
from streammerge.planner.jobs import Job

STACK = """
merge_method: passthrough
dtype: float16
slices:
  - sources: [{model: A, layer_range: [0, 3]}]
  - sources:
      - model: B
        layer_range: [1, 4]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]}
  - sources: [{model: C, layer_range: [3, 5]}]
"""


def test_stacking_renumbers_layers_and_takes_the_ends_from_the_ends() -> None:
    found = plan(STACK)
    names = [job.name for job in found.jobs]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["lm_head.weight", "model.norm.weight"]
    per_layer = [names[1 + 9 * i : 10 + 9 * i] for i in range(8)]
    assert all(name.startswith(f"model.layers.{i}.") for i in range(8) for name in per_layer[i])
    taken = {job.name: (job.experts[0].file.split("/")[2], job.experts[0].name) for job in found.jobs}
    ups = [taken[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(8)]
    origin = ["A0", "A1", "A2", "B1", "B2", "B3", "C3", "C4"]
    assert ups == [(at[0], f"model.layers.{at[1]}.mlp.up_proj.weight") for at in origin]
    assert taken["model.embed_tokens.weight"][0] == "A"
    assert taken["model.norm.weight"][0] == taken["lm_head.weight"][0] == "C"
    scales = {job.name: job.parameters["scale"] for job in found.jobs if job.parameters["scale"] != (1.0,)}
    assert scales == {
        f"model.layers.{i}.{part}.weight": (0.0,) for i in (3, 4, 5) for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert {job.dtype for job in found.jobs} == {"F16"}
    assert found.shards is None
    assert found.config == {"num_hidden_layers": 8, "layer_types": list("vwxwxyyz"), "torch_dtype": "float16"}
    assert found.donor is MODELS["A"]
    assert found.warnings == ()


def test_models_keep_order_layout_config_and_dtype() -> None:
    found = plan(f"{TIES}\nout_dtype: float32\ntokenizer_source: C")
    assert [job.name for job in found.jobs] == list(MODELS["A"].tensors)
    assert found.shards is not None
    assert [file for file, _ in found.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [name for _, names in found.shards for name in names] == list(MODELS["A"].tensors)
    assert len(found.shards[0][1]) == 24
    assert found.config == {**CONFIG, "torch_dtype": "float32"}
    assert found.donor is MODELS["C"]
    assert {job.dtype for job in found.jobs} == {"F32"}
    assert {job.dtype for job in plan(TIES).jobs} == {"BF16"}
    assert found.jobs[0].shape == (8, 4)


ALL = "parameters: {weight: 1}"


def test_the_base_of_linear_is_one_of_its_inputs_even_if_it_is_not_listed() -> None:
    text = "merge_method: linear\nbase_model: A\nmodels: [{model: B, parameters: {weight: 0.25}}]\n"
    job = jobs(text + ALL)["model.norm.weight"]
    assert [spec.file.split("/")[2] for spec in job.experts] == ["B", "A"]
    assert job.parameters["weight"] == (0.25, 1.0)
    assert job.base is None
    assert refused(text) == (
        "r.yml: models: linear needs 'weight' of A for tensor 'lm_head.weight'; linear merges the "
        "base too: list it "
        "with its weight, or leave base_model out",
        RecipeError,
    )


def test_an_optional_base_is_no_expert() -> None:
    job = jobs(f"merge_method: nuslerp\nbase_model: A\nmodels: [{{model: C}}, {{model: B}}]\n{ALL}")["lm_head.weight"]
    assert job.base == MODELS["A"].tensors["lm_head.weight"]
    assert [spec.file.split("/")[2] for spec in job.experts] == ["C", "B"]
    job = jobs(f"merge_method: nuslerp\nmodels: [{{model: C}}, {{model: B}}]\n{ALL}")["lm_head.weight"]
    assert job.base is None


def test_the_first_model_stands_in_for_a_base() -> None:
    other = checkpoint("B", llama(5, "F32"))
    job = jobs(f"merge_method: linear\nmodels: [{{model: B}}, {{model: A}}]\n{ALL}", B=other)["lm_head.weight"]
    assert job.dtype == "F32"


def test_what_cannot_be_merged_is_copied_from_the_base() -> None:
    tensors = {"ids": ("I64", (9,)), "w": ("BF16", (2,)), "flag": ("BOOL", (1,))}
    a, b = checkpoint("A", tensors), checkpoint("B", {"w": ("F32", (2,)), "ids": ("F32", (1,))})
    found = plan(f"merge_method: ties\nbase_model: A\nmodels: [{{model: B}}]\ndtype: float32\n{ALL}", A=a, B=b)
    assert found.jobs[0] == Job("ids", None, (a.tensors["ids"],), {}, "passthrough", "I64", (9,))
    assert found.jobs[1].dtype == "F32"
    assert found.jobs[2].experts == (a.tensors["flag"],)
    assert found.warnings == ("2 tensors no arithmetic can merge, copied from A (ids, flag)",)
    assert found.config is None


FP8 = {
    "a.weight": ("F8_E4M3", (4, 4)),
    "a.weight_scale_inv": ("F32", (1, 1)),
    "b.weight": ("F8_E4M3", (4, 4)),
    "q.qweight": ("I32", (4, 4)),
    "q.scales": ("F16", (4,)),
}


def test_quantised_weights_are_only_copied() -> None:
    a = checkpoint("A", FP8)
    text = f"merge_method: linear\nmodels: [{{model: A}}]\n{ALL}"
    message, kind = refused(text, A=a)
    assert kind is CheckpointError
    assert message == (
        "A: tensor 'a.weight' is quantised, its scales are 'a.weight_scale_inv'; such weights are "
        "not merged yet, "
        "convert the model to bfloat16 first"
    )
    text = "merge_method: passthrough\nmodels: [{model: A}]\ndtype: bfloat16\n"
    found = jobs(text, A=a)
    assert {name: job.dtype for name, job in found.items()} == {
        "a.weight": "F8_E4M3",
        "a.weight_scale_inv": "F32",
        "b.weight": "BF16",  # no scales: it stands for itself
        "q.qweight": "I32",
        "q.scales": "F16",
    }
    assert refused(f"{text}parameters: {{scale: 2}}", A=a)[0] == (
        "r.yml: models: scale cannot change tensor 'a.weight', which is quantised; leave it out with a filter"
    )


def test_tensors_that_do_not_fit() -> None:
    text = f"merge_method: ties\nbase_model: A\nmodels: [{{model: B}}]\n{ALL}"
    wide = checkpoint("B", llama(5, vocabulary=9))
    assert refused(text, B=wide) == (
        "B: tensor 'lm_head.weight' is [9, 4], in A it is [8, 4]; the vocabularies differ, bring the "
        "models to one "
        "tokenizer first",
        CheckpointError,
    )
    a = checkpoint("A", {"w": ("F32", (2, 3))})
    assert refused(text, A=a, B=checkpoint("B", {"w": ("F32", (3, 2))}))[0] == (
        "B: tensor 'w' is [3, 2], in A it is [2, 3]; only models of one architecture and size merge"
    )
    assert refused(text, A=a, B=checkpoint("B", {"w": ("I32", (2, 3))}))[0] == (
        "B: tensor 'w' is I32, in A it is F32; only floating dtypes merge"
    )
    assert refused(text, A=a, B=checkpoint("B", {"v": ("F32", (2, 3))})) == (
        "B: no tensor 'w', which A has; only models with the same tensors merge",
        CheckpointError,
    )
    assert refused(text, B=checkpoint("B", llama(5, head=False)))[0] == (
        "B: no tensor 'lm_head.weight', which A has; its head may be tied to the embedding: "
        "save it with the head written out"
    )


def test_warnings() -> None:
    more = checkpoint("B", {**llama(5), **{f"extra.{i}": ("F32", (1,)) for i in range(4)}})
    found = plan(
        """
        merge_method: ties
        base_model: A
        models: [{model: B, parameters: {lambda: 7}}, {model: A, parameters: {weight: 9, density: 1}}]
        parameters: {weight: [{filter: mpl, value: 2}, {filter: mlp, value: 3}, {value: 1}]}
        """,
        B=more,
    )
    assert found.warnings == (
        "r.yml: models: lambda of B is not read; set it for all models",
        "r.yml: models: weight, density of A is not read; the base model is no expert",
        "r.yml: filter 'mpl' matches no tensor",
        "B: 4 tensors that A lacks, left out (extra.0, extra.1, extra.2, ...)",
    )
    a = replace(MODELS["A"], config={"hidden_size": 4})
    assert plan(STACK, A=a).warnings == ("config.json of A holds no layer count of 5; set it to 8",)


SLICE = "slices:\n  - sources: [%s]\nparameters: {weight: 1}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "merge_method: ties\nmodels: [{model: B}]",
            "r.yml: models: ties needs a base_model; name the model that the others were fine-tuned from",
        ),
        (
            "merge_method: slerp\nmodels: [{model: B}, {model: A}]",
            "r.yml: models: slerp needs a base_model; name the model that the others were fine-tuned from",
        ),
        (
            "merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}, {model: C}]",
            "r.yml: models: slerp merges exactly 1 model beside the base model A; there are 2",
        ),
        (
            "merge_method: ties\nbase_model: A\nmodels: [{model: A}]",
            "r.yml: models: ties merges at least 1 model beside the base model A; there are 0",
        ),
        (
            "merge_method: nuslerp\nmodels: [{model: A}]",
            "r.yml: models: nuslerp merges exactly 2 models; there are 1",
        ),
        (
            "merge_method: passthrough\nbase_model: A\nmodels: [{model: B}]",
            "r.yml: models: passthrough merges exactly 1 model; there are 2, with the base A that joins them",
        ),
        ("merge_method: linear\nmodels: [{model: B}, {model: B}]", "r.yml: models: B is listed twice; list it once"),
        (
            "merge_method: linear\nmodels: [{model: B}, {model: A, parameters: {weight: []}}]",
            "r.yml: models[1].parameters.weight: an empty list; give a number or a gradient's points",
        ),
        (
            "merge_method: linear\nmodels: [{model: B, parameters: {weight: {filter: mlp, value: 1}}}]",
            "r.yml: models: linear needs 'weight' of B for tensor 'lm_head.weight'; add it to the model's parameters",
        ),
        (
            "merge_method: slerp\nbase_model: A\nmodels: [{model: B}]",
            "r.yml: models: slerp needs 't' for tensor 'lm_head.weight'; add it to parameters",
        ),
        (
            "merge_method: linear\n" + SLICE % "{model: A, layer_range: [0, 6]}",
            "r.yml: slices[0]: layer_range [0, 6] of A, which has 5 layers; they count from 0 and the end is left out",
        ),
        (
            "merge_method: linear\n" + SLICE % "{model: A, layer_range: [0, 3]}, {model: B, layer_range: [1, 3]}",
            "r.yml: slices[0]: A gives 3 layers, B 2; the sources of a slice must give equally many",
        ),
        (
            "merge_method: ties\nbase_model: C\n" + SLICE % "{model: A, layer_range: [0, 3]}",
            "r.yml: slices[0]: the base model C must be one of the sources",
        ),
    ],
)
def test_recipes_that_do_not_fit_their_method(text: str, line: str) -> None:
    assert refused(text) == (line, RecipeError)


def test_slices_need_one_stack() -> None:
    t5 = {f"{part}.block.{i}.w": ("F32", (1,)) for part in ("encoder", "decoder") for i in range(2)}
    text = "merge_method: linear\n" + SLICE % "{model: A, layer_range: [0, 1]}"
    assert refused(text, A=checkpoint("A", t5)) == (
        "A: 2 layer stacks, slices need one: encoder.block (2 layers), decoder.block (2 layers); use 'models'",
        CheckpointError,
    )
