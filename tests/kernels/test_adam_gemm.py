"""adam_gemm: 300 steps against torch.optim.Adam on the loss itself, one step against its update rule."""

from __future__ import annotations

import arguments
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import adam_gemm, reference
from streammerge.kernels.host.adam_gemm import constants
from streammerge.kernels.queue import Queue
from streammerge.kernels.reference import bits, span


def deltas(rows, columns, count, spread, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(rows, columns, generator=random, dtype=torch.float64) for _ in range(count)]


def sums(tasks):
    """What the loss needs of the task vectors, in fp64: gram and target."""
    weights = [1 / t.square().sum() for t in tasks]
    gram = sum(w * t.T @ t for w, t in zip(weights, tasks, strict=True))
    return gram, sum(w * t @ t.T @ t for w, t in zip(weights, tasks, strict=True))


def optimise(tasks, steps, lr):
    """The reference: autograd through the loss, in fp64."""
    x = sum(tasks).clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        loss = sum((((x - t) @ t.T) ** 2).sum() / t.square().sum() for t in tasks)
        loss.backward()
        adam.step()
    return x.detach()


def walk(x, gram, target, steps, lr, how):
    """The same by the kernel; x [m, n] in fp32."""
    shape, place = x.shape, "cpu" if how == "host" else arguments.DEVICE
    flat = [t.float().reshape(-1).contiguous().to(place) for t in (x, x, gram, target)]
    now, out, gram, target = flat[0], torch.full_like(flat[0], torch.nan), *flat[2:]
    moments = [torch.zeros_like(now) for _ in range(2)]
    queue = Queue.on(arguments.DEVICE, 1 << 12, 1 << 12)
    for step in range(1, steps + 1):
        args = [out, now, gram, target, *moments]
        if how == "host":
            kernel.host("adam_gemm").host(*reference.spans(args), step, lr)
        else:
            adam_gemm.launch(queue, *reference.spans(args, queue), step, lr, precision=how)
        now, out = out, now
    queue.end().wait()
    return now.cpu().view(shape)


@pytest.mark.parametrize(
    ("how", "steps", "bound"),
    [
        ("host", 300, 1e-5),
        pytest.param("tf32x3", 300, 1e-5, marks=pytest.mark.slow),
        ("tf32x3", 30, 1e-5),
        ("ieee", 30, 1e-5),
        ("bf16x3", 30, 2e-4),
    ],
)
def test_steps_of_wudi(how, steps, bound):
    """The bound is in units of the largest distance that an entry travels."""
    tasks = deltas(24, 40, 3, 1e-3)
    start, end = sum(tasks), optimise(tasks, steps, 1e-5)
    found = walk(start, *sums(tasks), steps, 1e-5, how)
    travelled = (end - start).abs().max()
    assert travelled > 0.5 * min(steps, 200) * 1e-5
    assert (found - end).abs().max() < bound * travelled


def test_tf32_is_not_enough_for_that():
    """Else the interpreter would show nothing of the precision."""
    tasks = deltas(24, 40, 3, 1e-3)
    end = optimise(tasks, 30, 1e-5)
    error = (walk(sum(tasks), *sums(tasks), 30, 1e-5, "tf32") - end).abs().max()
    assert error > 2e-5 * (end - sum(tasks)).abs().max()


@pytest.mark.parametrize("how", ["host", "tf32x3"])
def test_one_task_stays_where_it_is(how):
    """The gradient is exactly zero where all sums are exact."""
    task = torch.randint(-3, 4, (20, 30)).double()
    gram = task.T @ task
    assert torch.equal(walk(task, gram, task @ gram, 5, 1e-2, how), task.float())


@pytest.mark.parametrize("how", ["host", "tf32x3"])
def test_the_first_step_is_as_long_as_the_rate(how):
    tasks = deltas(10, 12, 2, 1.0)
    start = sum(tasks).float()
    moved = walk(start, *sums(tasks), 1, 0.25, how) - start
    assert torch.allclose(moved.abs(), torch.tensor(0.25), rtol=1e-3)


def test_updates_as_torch_does():
    """The same gradients, from gram = 0: torch may fuse a multiplication with an addition, hence not to the bit."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(500, generator=random)
    theirs = weight.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.8, 0.95), eps=1e-3, foreach=False)
    ours, out, gram = weight.clone(), torch.empty(500), torch.zeros(25 * 25)
    mean, square = torch.zeros(500), torch.zeros(500)
    for step in range(1, 8):
        gradient = torch.randn(500, generator=random)
        theirs.grad = gradient
        adam.step()
        args = [out, ours, gram, -gradient / 2, mean, square]
        kernel.host("adam_gemm").host(*reference.spans(args), step, 1e-2, 0.8, 0.95, 1e-3)
        ours, out = out, ours
    state = adam.state[theirs]
    for one, two in ((ours, theirs.detach()), (mean, state["exp_avg"]), (square, state["exp_avg_sq"])):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-7)


def test_constants():
    assert constants(1, 1e-5, 0.9, 0.999, 1e-8)[3] == pytest.approx(1e-4, rel=1e-6)
    assert constants(10**6, 1e-5, 0.9, 0.999, 1e-8)[3:5] == (pytest.approx(1e-5, rel=1e-6), 1)
    with pytest.raises(AssertionError):
        constants(0, 1e-5, 0.9, 0.999, 1e-8)


@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (3, 1), (65, 17), (63, 130), (16, 144)])
def test_odd_sizes(rows, columns):
    for precision in ("tf32x3", "bf16x3", "ieee"):
        args = adam_gemm.inputs(rows, columns, 4, precision)
        arguments.agree(adam_gemm, args)
        arguments.launch_agrees(adam_gemm, args)


def test_only_outputs_change():
    args = adam_gemm.inputs(20, 30, 2, "ieee")
    before = [arguments.copy(a) for a in args]
    kernel.host("adam_gemm").host(*reference.spans(list(args)))
    assert [i for i in range(6) if not torch.equal(bits(args[i]), bits(before[i]))] == [0, 4, 5]


def test_out_is_another_buffer():
    out, x, gram, target, mean, square, *_ = adam_gemm.inputs(4, 5, 1, "ieee")
    with pytest.raises(AssertionError):
        kernel.host("adam_gemm").host(*(span(t) for t in (x, x, gram, target, mean, square)), 1)
    assert adam_gemm.flops(out, x, gram) == 2 * 4 * 5 * 5
