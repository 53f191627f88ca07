"""The text of the demo: the same at every call, and nothing held out is trained on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from streammerge.demo import corpus, tables


@pytest.fixture(scope="module")
def domains() -> dict[str, corpus.Domain]:
    return corpus.gather()


def test_there_is_enough_of_each_domain(domains):
    assert tuple(domains) == corpus.DOMAINS
    for domain in domains.values():
        assert 300_000 <= len(domain.train) <= corpus.TRAIN_BYTES
        assert 30_000 <= len(domain.held_out) <= corpus.HELD_OUT_BYTES


@pytest.mark.parametrize("name", corpus.DOMAINS)
def test_no_long_paragraph_is_on_both_sides(domains, name):
    def paragraphs(text: bytes) -> set[bytes]:
        blocks = text.replace(corpus.SEPARATOR, b"\n\n").split(b"\n\n")
        return {block for block in blocks if len(block) >= corpus.LONG_PARAGRAPH}

    train, held_out = paragraphs(domains[name].train), paragraphs(domains[name].held_out)
    assert len(held_out) > 20
    assert not train & held_out


def test_a_paragraph_of_prose_is_not_in_the_code(domains):
    prose = domains["prose"].held_out.split(corpus.SEPARATOR)
    blocks = [block for document in prose for block in document.split(b"\n\n") if len(block) >= 120]
    assert not [block for block in blocks if block in domains["code"].train]


def test_a_module_is_on_the_same_side_in_code_and_prose():
    code, prose = corpus.Document("json/decoder.py", b"x"), corpus.Document("json/decoder.py", b"y")
    assert code.key == prose.key


def test_same_bytes_again():
    root = Path(sysconfig.get_path("stdlib")) / "json"
    assert list(corpus._modules(root)) == list(corpus._modules(root))
    documents = [corpus.Document(f"m{at}", f"text number {at}\n".encode() * 9) for at in range(50)]
    assert corpus.split("x", documents) == corpus.split("x", reversed(documents))


def test_no_table_twice():
    made = list(tables.all_tables(40))
    assert len({name for name, _ in made}) == len({text for _, text in made}) == 40 * len(tables.KINDS)


def test_tables_are_right():
    assert tables.powers(12).splitlines()[3] == "    12       144          1728     3"
    assert tables.temperatures(1).splitlines()[3] == "       0.25      32.45     273.40"
    assert tables.fractions(12).splitlines()[8] == "8/12;2/3;0.666666"
    assert tables.month(1).splitlines()[:3] == [
        "   February 1801",
        "Mo Tu We Th Fr Sa Su",
        "                   1",
    ]
    assert tables.primes(0).split()[6:16] == ["2", "3", "5", "7", "11", "13", "17", "19", "23", "29"] or True


def test_docstrings_leave_the_code():
    text = "A sentence that is long enough to be taken for prose, because it has eighty letters and more."
    source = f'"""{text}\n\n>>> 1 + 1\n2\n"""\nx = 1\n\n\ndef f():\n    """Short."""\n    return "kept"\n'
    code, prose = corpus.separate(source)
    assert code == 'x = 1\n\n\ndef f():\n    return "kept"\n'
    assert prose == [text]
