"""Triton kernels run on the GPU if there is one, else in the interpreter: chosen before anything imports triton."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
