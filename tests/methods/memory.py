"""What arithmetic holds at its peak, looked at from outside of Python: torch's memory is not traced."""

import os
import subprocess
import sys
import textwrap

CODE = """
import threading

import numpy as np
import torch
from merging import run


def held():
    return sum(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))


def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())


torch.set_num_threads(2)
{before}
start = peak = held()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
{work}
done.set()
watcher.join()
print(peak - start, {told})
"""
METHOD = """
from streammerge import method as methods
from streammerge.methods import _tall

def inputs(*shape):
    return np.zeros(shape, np.float32), [rng.random(shape, np.float32) - 0.5 for _ in range(count)]

name, options, shape, count, by_rows = {arguments}
rng, method = np.random.default_rng(0), methods.build(methods.find(name), {{"weight": 1.0, **options}})
if by_rows:
    _tall.LARGE, _tall.RATIO = 0, 0
run(method, *inputs(40, 30))  # whatever is made once is made now
taken = inputs(*shape)
"""


def held_by(before, work, told):
    """Anonymous memory in bytes that code takes at its peak on top of what it held `before`, and the numbers `told`.

    All three are code, of a process of its own.
    """
    code = CODE.format(before=textwrap.dedent(before), work=textwrap.dedent(work), told=told)
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return [int(word) for word in found.stdout.split()]


def peak_of(name, options, shape, count, by_rows=False):
    """What a method holds beside inputs and result, and what it declares, in bytes."""
    before = METHOD.format(arguments=(name, options, shape, count, by_rows))
    work = "out, _ = run(method, *taken, tile=1024 * shape[1])"
    told = 'out.nbytes, method.for_tensor("w", shape, count).survey_bytes(shape, count, 1)'
    peak, result, declared = held_by(before, work, told)
    return peak - result, declared
