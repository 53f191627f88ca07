"""What the figures of transport.py are held against, how they are shown, and what they say.

The yardstick was measured with whole-model autograd on the permuted encoder, with experts trained in the same way from
other seeds: one figure for each domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bounds import Verdict
from rich.table import Table
from transport_rows import Row

NEAR = 0.02  # accuracy
SAME = 2e-3  # share of weights that may differ from whole-model autograd's
LITTLE = 0.8  # share of the gain from which the task vector's own values count as of little use
YARDSTICK = {
    "B": (0.731, 0.500, 0.729),
    "B + tau": (0.736, 0.504, 0.724),
    "vote": (0.813, 0.707, 0.769),
    "mean": (0.807, 0.700, 0.827),
    "shuffled": (0.813, 0.716, 0.769),
    "oracle sign": (0.956, 0.927, 0.967),
    "oracle": (0.962, 0.958, 0.976),
}
DOMAINS = ("banking", "home", "work")
HEADINGS = ("", "samples", "{figure}", "validation loss", "alpha", "kept", "ties", "norm / tau's", "s")


@dataclass(frozen=True)
class Found:
    """A case: one task vector at one target."""

    case: str
    task: str
    figure: str
    rows: Sequence[Row]
    apart: float  # norm of B - A, over that of tau
    compared: Mapping[str, float] | None = None

    @property
    def better(self) -> int:
        """1 where more is better."""
        return 1 if self.figure == "accuracy" else -1

    def row(self, label: str) -> Row | None:
        return next((row for row in self.rows if row.label == label), None)

    def gain(self, label: str, samples: int | None = None) -> float | None:
        """How much better than the target, by the case's figure; of several numbers of samples with the one named."""
        target = self.row("B")
        rows = [row for row in self.rows if row.label == label and samples in (None, row.samples)]
        return self.better * (rows[0].figure - target.figure) if rows and target else None


def table(found: Found) -> Table:
    shown = Table(title=f"{found.case}: {found.task}; B lies {found.apart:.1f} norms of tau from A")
    for heading in HEADINGS:
        shown.add_column(heading.format(figure=found.figure), justify="right" if heading else "left")
    for row in found.rows:
        shown.add_row(
            row.label,
            "" if row.samples is None else str(row.samples),
            f"{row.figure:.4f}",
            f"{row.loss:.4f}",
            "" if row.alpha is None else f"{row.alpha:g}",
            *("" if share is None else f"{share:.1%}" for share in (row.kept, row.ties)),
            "" if row.norm is None else f"{row.norm:.2f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
    return shown


def judge(found: Found, whole: bool) -> Iterator[Verdict]:
    """The yardstick's figures, and the weights of whole-model autograd."""
    at = f"{found.case} {found.task}"
    if found.case == "permuted" and found.task in DOMAINS:
        for label, wanted in YARDSTICK.items():
            row, figure = found.row(label), wanted[DOMAINS.index(found.task)]
            if row is not None:
                near = abs(row.figure - figure) <= NEAR
                yield Verdict(f"{at}: {label}", f"{row.figure:.4f}", f"{figure} +- {NEAR}", near if whole else None)
    if found.compared is not None:
        share = found.compared["differing"] / found.compared["weights"]
        yield Verdict(f"{at}: weights unlike whole-model autograd's", f"{share:.1e}", f"<= {SAME}", share <= SAME)


def says(found: Found) -> Iterator[str]:
    """What the controls say about a case, in words that follow from its figures."""
    at = f"{found.case} {found.task}"
    counts = [row.samples for row in found.rows if row.label == "vote"]
    if len(counts) > 1:
        for label in ("vote", "shuffled"):
            gains = ", ".join(f"{found.gain(label, count):+.3f} ({count})" for count in counts)
            yield f"{at}: gains of {label} by samples: {gains}."
        return
    vote, shuffled, oracle = (found.gain(label) for label in ("vote", "shuffled", "oracle"))
    assert vote is not None
    assert shuffled is not None
    if vote <= 0:
        yield f"{at}: GradFix gains nothing ({vote:+.4f})."
    else:
        share = shuffled / vote
        what = (
            "the gradients' signs do the work, the task vector's values carry little"
            if share >= LITTLE
            else "the task vector's own values matter"
        )
        of = "" if not oracle or oracle <= 0 else f", {vote / oracle:.0%} of the oracle's gain"
        yield f"{at}: GradFix gains {vote:.4f}{of}; a shuffled task vector has {share:.0%} of that: {what}."
    plain, steps = ("B + tau",), ("one step, gradient", "one step, signs")
    for labels, how in ((plain, "without a mask"), (steps, "without a task vector")):
        gain, label = max((gain, label) for label in labels if (gain := found.gain(label)) is not None)
        word = "more than" if gain > vote else "less than" if gain < vote else "as much as"
        yield f"{at}: {label}, {how}, gains {gain:+.4f}, {word} GradFix."
