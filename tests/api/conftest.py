"""Models of two pre-trainings and their fine-tunes, made once for each process of tests."""

import pytest


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory):
    from transport import made

    return made(tmp_path_factory.mktemp("world"), tie_word_embeddings=request.param)


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    from transport import made

    return made(tmp_path_factory.mktemp("untied"))


@pytest.fixture
def alphas(world):
    """What a recipe says that tries several."""
    from transport import ALPHAS

    data = {name: str(world.folder / f"{name}.jsonl") for name in ("train", "validation")}
    return {"parameters": {"alpha": ALPHAS}, "data": data}
