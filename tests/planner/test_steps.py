"""The order of work as pure integers: every element once and in order, every byte at a place that is its own."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.formats.header import TensorSpec
from streammerge.method import SLICES, Flags, TileMethod
from streammerge.planner.jobs import Job
from streammerge.planner.steps import (
    GAP,
    Cut,
    PlannedTensor,
    is_resident,
    itemsize,
    lay_out,
    merge_steps,
    sample_step,
    smallest_step,
    tiles,
)
from streammerge.store.ring import PAGE

WIDTHS = {"F32": 4, "BF16": 2, "F64": 8, "F8_E4M3": 1}


@dataclass(frozen=True)
class Cutting(TileMethod):
    """A method that only says where it may be cut."""

    size: int = 4096

    def grain(self, shape: tuple[int, ...]) -> int:
        return self.size

    def merge(self, tile: object, survey: object) -> Flags:
        raise AssertionError("nothing is merged here")


def spec(name: str, dtype: str, numel: int, file: str, begin: int) -> TensorSpec:
    return TensorSpec(name, dtype, (numel,), file, begin, begin + numel * WIDTHS[dtype])


def planned(numels, inputs=2, dtype="F32", grain=4096, surveyed=(), shards=(), lead=0, gap=0):
    """Output tensors one after the other, from `inputs` files that are laid out the same way."""
    tensors = []
    at = PAGE + lead
    out = PAGE
    shard = 0
    for index, numel in enumerate(numels):
        if index in shards:
            shard, out = shard + 1, PAGE
        specs = [spec(f"t{index}", dtype, numel, f"/in/{which}", at) for which in range(inputs)]
        job = Job(f"t{index}", specs[0], tuple(specs[1:]), {}, "cutting", dtype, (numel,))
        end = out + numel * WIDTHS[dtype]
        tensors.append(PlannedTensor(job, Cutting(grain), index in surveyed, shard, out, end))
        at += numel * WIDTHS[dtype] + gap
        out = end
    return tensors


def check(tensors, steps, cut, first=0, start=0):
    """Everything that must hold of any list of steps."""
    cap = max(cut.step, smallest_step(tensors))
    merged = {index: start if index == first else 0 for index in range(first, len(tensors))}
    surveyed = dict.fromkeys(merged, 0)
    begun = []
    for step in steps:
        spans = []
        for extent in step.extents:
            assert 0 <= extent.begin < extent.end
            assert extent.begin % PAGE == extent.offset % PAGE
            first_page = extent.offset // PAGE * PAGE
            spans.append((first_page, -(-(extent.offset + extent.end - extent.begin) // PAGE) * PAGE))
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "extents share a page of the slot"
        assert all(end <= step.size for _, end in spans)
        assert step.size <= cap or step.kind == "sample"
        assert step.size % PAGE == 0
        for piece in step.pieces:
            tensor = tensors[piece.tensor]
            assert piece.start + piece.numel <= tensor.numel
            for which, item in enumerate(tensor.inputs if piece.numel else ()):
                begin = item.begin + piece.start * itemsize(item)
                end = begin + piece.numel * itemsize(item)
                assert item.begin <= begin <= end <= item.end
                homes = [
                    e
                    for e in step.extents
                    if e.file == item.file
                    and e.begin <= begin
                    and end <= e.end
                    and e.offset + begin - e.begin == piece.offsets[which]
                ]
                assert len(homes) == 1, "an input's bytes are not where the piece says"
            if step.kind == "merge":
                assert piece.start == merged[piece.tensor], "elements are not merged in order, once"
                merged[piece.tensor] += piece.numel
                begun.append(piece.tensor)
            elif step.kind == "survey":
                assert piece.start == surveyed[piece.tensor]
                surveyed[piece.tensor] += piece.numel
        if step.kind == "merge":
            assert len({tensors[piece.tensor].shard for piece in step.pieces}) == 1
            out = [tensors[p.tensor].begin + p.start * tensors[p.tensor].out_itemsize for p in step.pieces]
            ends = [a + p.numel * tensors[p.tensor].out_itemsize for a, p in zip(out, step.pieces, strict=True)]
            assert out[1:] == ends[:-1], "one step's results are not contiguous"
        for piece in step.pieces:
            grain = tensors[piece.tensor].method.grain(())
            assert piece.start % grain == 0 or (piece.tensor, piece.start) == (first, start)
    assert merged == {index: tensors[index].numel for index in merged}
    assert begun == sorted(begun), "tensors are merged out of order"
    return surveyed


@st.composite
def cases(draw):
    grain = draw(st.sampled_from([1, 3, 100, 4096, 5000]))
    dtype = draw(st.sampled_from(sorted(WIDTHS)))
    numels = draw(st.lists(st.integers(0, 40_000) | st.sampled_from([0, 1, 4096, 8192]), min_size=1, max_size=8))
    some = st.sets(st.integers(0, len(numels) - 1))
    tensors = planned(
        numels,
        draw(st.integers(1, 4)),
        dtype,
        grain,
        draw(some),
        draw(some) - {0},
        draw(st.integers(0, 9)),
        draw(st.sampled_from([0, 1, GAP - 1, GAP, GAP + 1, 9999])),
    )
    step = smallest_step(tensors) + draw(st.integers(20_000, 200_000))
    return tensors, Cut(step, step * draw(st.integers(1, 8)))


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_every_element_is_merged_once_in_order(case, data):
    tensors, cut = case
    steps = list(merge_steps(tensors, cut))
    seen = check(tensors, steps, cut)
    for index, tensor in enumerate(tensors):
        assert seen[index] in (0, tensor.numel)
    first = data.draw(st.integers(0, len(tensors) - 1))
    grains = tensors[first].numel // tensors[first].method.grain(())
    start = 0 if tensors[first].surveyed else data.draw(st.integers(0, grains)) * tensors[first].method.grain(())
    start = min(start, tensors[first].numel)
    check(tensors, list(merge_steps(tensors, cut, first, start)), cut, first, start)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_the_total_that_is_read_does_not_depend_on_the_cut(case):
    """Beside gaps that are read and thrown away, every input byte is read once per pass."""
    tensors, cut = case
    unsurveyed = [replace(tensor, surveyed=False) for tensor in tensors]
    needed = sum(tensor.numel * tensor.width for tensor in tensors)
    read = sum(step.read_bytes for step in merge_steps(unsurveyed, cut))
    assert needed <= read <= needed + len(tensors) * len(tensors[0].inputs) * GAP


def test_small_neighbours_are_one_read():
    tensors = planned([100] * 50, inputs=3)
    (step,) = merge_steps(tensors, Cut(8 << 20, 32 << 20))
    assert [(e.file, e.begin, e.end) for e in step.extents] == [
        (f"/in/{which}", PAGE, PAGE + 50 * 400) for which in range(3)
    ]
    assert len(step.pieces) == 50
    assert step.pieces[7].offsets == tuple(e.offset + 7 * 400 for e in step.extents)


def test_a_gap_of_a_page_is_read_over_and_a_wider_one_is_not():
    near = lay_out(*_pair(GAP))[0]
    far = lay_out(*_pair(GAP + 4))[0]
    assert (len(near), len(far)) == (1, 2)


def _pair(gap):
    tensors = planned([10, 10], inputs=1, gap=gap)
    return tensors, [step.pieces[0] for step in merge_steps(tensors, Cut(smallest_step(tensors), 0))]


def test_neighbours_that_would_be_misaligned_are_read_apart():
    one = spec("a", "F8_E4M3", 3, "/in/0", PAGE)
    two = spec("b", "F32", 5, "/in/0", PAGE + 3)
    tensors = [
        PlannedTensor(Job(s.name, None, (s,), {}, "c", s.dtype, s.shape), Cutting(), False, 0, at, at + s.nbytes)
        for s, at in ((two, PAGE), (one, PAGE + 20))
    ]
    (step,) = merge_steps(tensors[::-1], Cut(1 << 20, 1 << 20))
    assert len(step.extents) == 2


def test_a_tensor_that_is_named_twice_is_read_once():
    twin = spec("x", "F32", 5000, "/in/0", PAGE + 12)
    other = spec("x", "F32", 5000, "/in/1", PAGE)
    job = Job("x", twin, (other, twin), {}, "cutting", "F32", (5000,))
    (step,) = merge_steps([PlannedTensor(job, Cutting(), False, 0, PAGE, PAGE + 20_000)], Cut(1 << 20, 1 << 20))
    assert step.read_bytes == 40_000
    assert step.pieces[0].offsets[0] == step.pieces[0].offsets[2] != step.pieces[0].offsets[1]


def test_what_fits_the_ring_is_surveyed_where_it_lies():
    tensors = planned([100_000], surveyed={0})
    cut = Cut(256 << 10, 4 << 20)
    assert is_resident(tensors, 0, cut)
    steps = list(merge_steps(tensors, cut))
    assert {step.kind for step in steps} == {"merge"}
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    check(tensors, steps, cut)


def test_what_does_not_fit_is_sampled_surveyed_and_read_again():
    tensors = planned([100_000, 10, 200_000], surveyed={0, 2})
    cut = Cut(256 << 10, 600 << 10)
    steps = list(merge_steps(tensors, cut))
    kinds = [(step.pieces[0].tensor, step.kind) for step in steps]
    order = list(dict.fromkeys(kinds))
    large = [(0, "sample"), (0, "survey"), (0, "merge")], [(2, "sample"), (2, "survey"), (2, "merge")]
    assert order == [*large[0], (1, "merge"), *large[1]]
    assert check(tensors, steps, cut) == {0: 100_000, 1: 0, 2: 200_000}
    assert all(step.last for step in steps)


@pytest.mark.parametrize("numel", [128, 1000, 100_000, 5_000_001])
def test_a_sample_lies_inside_its_tensor_and_is_spread(numel):
    tensors = planned([numel], surveyed={0}, grain=4096)
    (step,) = sample_step(tensors, 0)
    assert len(step.pieces) == SLICES
    assert all(0 <= p.start <= p.start + p.numel <= numel for p in step.pieces)
    assert step.pieces[0].start == 0
    assert step.pieces[-1].start >= (numel - step.pieces[-1].numel) // 4096 * 4096


@settings(deadline=None)
@given(st.integers(1, 10**5), st.integers(100, 10_000), st.integers(1, 1 << 20), st.integers(0, 10**5))
def test_tiles_cover_a_tensor(numel, grain, step, room):
    (tensor,) = planned([numel], grain=grain)
    start = numel // 2 // grain * grain
    found = list(tiles(tensor, Cut(step, 0), start, room))
    assert [found[0][0], found[-1][1]] == [start, numel]
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(lo % grain == 0 and lo < hi for lo, hi in found)
