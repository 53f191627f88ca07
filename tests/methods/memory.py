"""What one method holds at its peak, looked at from outside of Python: torch's memory is not traced."""

import os
import subprocess
import sys
import textwrap

CODE = """
    import threading
    import numpy as np, torch
    from merging import run
    from streammerge import method as methods
    from streammerge.methods import _tall

    def held():
        return sum(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, held())

    def inputs(*shape):
        return np.zeros(shape, np.float32), [rng.random(shape, np.float32) - 0.5 for _ in range(count)]

    name, options, shape, count, by_rows = {arguments}
    torch.set_num_threads(2)
    rng, method = np.random.default_rng(0), methods.build(methods.find(name), {{"weight": 1.0, **options}})
    if by_rows:
        _tall.LARGE, _tall.RATIO = 0, 0
    run(method, *inputs(40, 30))  # whatever is made once is made now
    taken = inputs(*shape)
    before = peak = held()
    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = run(method, *taken, tile=1024 * shape[1])
    done.set()
    watcher.join()
    print(peak - before - out.nbytes, method.for_tensor("w", shape, count).survey_bytes(shape, count, 1))
"""


def peak_of(name, options, shape, count, by_rows=False):
    """Anonymous memory beside inputs and result, and what is declared, in bytes; of a process of its own."""
    code = textwrap.dedent(CODE).format(arguments=(name, options, shape, count, by_rows))
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return [int(word) for word in found.stdout.split()]
