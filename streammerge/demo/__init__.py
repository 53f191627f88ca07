"""`streammerge demo`: a small real case, from text to trained models to merges to scores.

run(folder) trains a byte-level Llama and three experts, merges them by every method under a budget, and
prints what each is worth on held-out text. Needs transformers; downloads nothing.
"""

from streammerge.demo.pipeline import Settings, run

__all__ = ["Settings", "run"]
