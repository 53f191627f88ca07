"""Tables of numbers, computed exactly, so that every machine prints the same bytes.

A table is one of six kinds (multiplication, powers, primes, calendar month, temperatures, fractions) at
one start value. Ranges of one kind never overlap and a table is printed once, so that a held-out table
shares its layout with the training text but not its rows (months apart: there are only 28 of them, under
other years). All arithmetic is on integers: no rounding mode, locale or libm has a say.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable, Iterator
from math import gcd, isqrt

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
ROWS = 12


def multiplication(start: int) -> str:
    """Twelve rows of products, columns 1 to 9."""
    head = "   x |" + "".join(f"{column:6d}" for column in range(1, 10))
    rows = [
        f"{row:4d} |" + "".join(f"{row * column:6d}" for column in range(1, 10)) for row in range(start, start + ROWS)
    ]
    return "\n".join(["Multiplication", head, "-" * len(head), *rows])


def powers(start: int) -> str:
    """n, its square, its cube and the whole part of its root."""
    head = "     n    square          cube  root"
    rows = [f"{n:6d}{n * n:10d}{n * n * n:14d}{isqrt(n):6d}" for n in range(start, start + ROWS)]
    return "\n".join(["Powers", head, "-" * len(head), *rows])


def primes(start: int) -> str:
    """The primes of a range of 500 numbers, ten to a row."""
    found = [n for n in range(max(start, 2), start + 500) if all(n % d for d in range(2, isqrt(n) + 1))]
    rows = ["".join(f"{n:7d}" for n in found[at : at + 10]) for at in range(0, len(found), 10)]
    return "\n".join([f"Primes from {start} to {start + 499}", "-" * 70, *rows])


def month(index: int) -> str:
    """One month of the Gregorian calendar, weeks from Monday; index 0 is January 1801."""
    year, number = 1801 + index // 12, index % 12
    weeks = calendar.Calendar().monthdayscalendar(year, number + 1)
    rows = [" ".join(f"{day:2d}" if day else "  " for day in week).rstrip() for week in weeks]
    return "\n".join([f"{MONTHS[number]} {year}".center(20).rstrip(), "Mo Tu We Th Fr Sa Su", *rows])


def temperatures(start: int) -> str:
    """Celsius, Fahrenheit and kelvin, two decimals, from hundredths kept as integers."""
    rows = []
    for celsius in range(start * 25, (start + ROWS) * 25, 25):
        fields = (celsius, celsius * 9 // 5 + 3200, celsius + 27315)
        rows.append("".join(f"{value // 100:8d}.{value % 100:02d}" for value in fields))
    head = "    Celsius Fahrenheit    Kelvin"
    return "\n".join(["Temperature", head, "-" * len(head), *rows])


def fractions(start: int) -> str:
    """k/n in lowest terms and as six decimals, cut off, separated by semicolons."""
    rows = []
    for k in range(1, ROWS + 1):
        common = gcd(k, start)
        rows.append(f"{k}/{start};{k // common}/{start // common};{k // start}.{k % start * 10**6 // start:06d}")
    return "\n".join(["fraction;reduced;decimal", *rows])


#: kind, function, first start value, distance between two tables of that kind
KINDS: tuple[tuple[Callable[[int], str], int, int], ...] = (
    (multiplication, 2, ROWS),
    (powers, 1, ROWS),
    (primes, 0, 500),
    (month, 0, 1),
    (temperatures, 0, ROWS),
    (fractions, 13, 1),
)


def all_tables(count: int) -> Iterator[tuple[str, str]]:
    """`count` tables of each kind as (name, text); the name, for instance `month/7`, is unique."""
    for at in range(count):
        for make, first, step in KINDS:
            yield f"{make.__name__}/{at}", make(first + at * step) + "\n"
