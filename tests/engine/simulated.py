"""A GPU made of host memory that does its work as late, and in as odd an order, as its streams allow.

Copies and kernels wait in their stream until somebody waits for an event; then streams are advanced in random turn,
one held back by another's event only if the program said so. An event that was forgotten, or memory that was used
again too early, gives wrong bytes.
"""

from __future__ import annotations

import random
from collections import deque
from contextlib import contextmanager

import torch

from streammerge.engine import device
from streammerge.engine.device import Streams

REAL = torch.cuda.is_available()


class World:
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.streams = [Stream(self) for _ in range(3)]

    def step(self) -> bool:
        """One piece of work of some stream that may go on."""
        ready = [s for s in self.streams if s.waiting and (s.waiting[0][0] != "after" or s.waiting[0][1].done)]
        if not ready:
            return False
        kind, what = self.dice.choice(ready).waiting.popleft()
        if kind == "run":
            what()
        elif kind == "mark":
            what.done = True
        return True


class Event:
    def __init__(self, world: World) -> None:
        self._world, self.done = world, False

    def wait(self) -> None:
        while not self.done:
            assert self._world.step(), "the streams wait for each other"

    def passed(self) -> bool:
        for _ in range(self._world.dice.choice([0, 0, 1, 3])):
            self._world.step()
        return self.done


class Stream:
    def __init__(self, world: World) -> None:
        self._world = world
        self.waiting: deque = deque()
        self._held = False  # torch's operations go here: the host is no longer ahead

    def copy(self, target, source) -> None:
        assert target.numel() == source.numel()
        self.run(lambda: target.copy_(source))

    def run(self, work) -> None:
        if self._held:
            work()
        else:
            self.waiting.append(("run", work))

    @contextmanager
    def current(self):
        """Torch does at once what it is told, so what waits here is done first and nothing is put off meanwhile."""
        while self.waiting:
            assert self._world.step(), "the streams wait for each other"
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def mark(self) -> Event:
        event = Event(self._world)
        self.waiting.append(("mark", event))
        return event

    def after(self, event) -> None:
        self.waiting.append(("after", event))


def install(monkeypatch, seed: int = 0, free: int = 8 << 30) -> None:
    """`--device cuda` is this GPU."""

    def open_streams(name):
        world = World(seed)
        return torch.device("cpu"), Streams(*world.streams)

    real = device.find
    monkeypatch.setattr(device, "open_streams", open_streams)
    monkeypatch.setattr(device, "find", lambda wanted: ("cuda:0", free) if wanted.startswith("cuda") else real(wanted))
