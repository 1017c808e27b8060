"""The rows of the check: a claim, what was predicted and measured, and a verdict. Imports no torch."""

import collections
import math

from tools.benchmark.harness import table

PASSES, FAILS, NOT_RUN, NOTED = "passes", "fails", "not run", "noted"
DIGITS = {"GiB": 2, "MiB": 1, "KiB": 1, "s": 3, "ms": 2, "TFLOP/s": 0}


def row(claim, predicted, measured, unit="", holds=None, remark="", **numbers):
    """A claim that was measured. predicted, measured: numbers in `unit`, or words. holds: None for a number without a claim.

    remark: one sentence for the table. numbers: further ones, for the JSON file.
    """
    verdict = NOTED if holds is None else PASSES if holds else FAILS
    return {"claim": claim, "predicted": predicted, "measured": measured, "unit": unit, "verdict": verdict, "remark": remark} | numbers


def not_run(claim, reason):
    """A claim that could not be measured here."""
    return {"claim": claim, "predicted": None, "measured": None, "unit": "", "verdict": NOT_RUN, "remark": reason}


def failed(claim, reason):
    """A claim whose measurement ended with an error."""
    return {"claim": claim, "predicted": None, "measured": None, "unit": "", "verdict": FAILS, "remark": reason}


def unit_of(size):
    """(name, bytes) of the unit in which a number of bytes is shown."""
    return ("GiB", 2**30) if size > 2**28 else ("MiB", 2**20) if size > 2**18 else ("KiB", 2**10)


def within(predicted, measured, share):
    """Whether two numbers agree, to a share of the measured one."""
    return math.isfinite(measured) and abs(predicted - measured) <= share * abs(measured)


def spell(value, unit):
    """A value as a cell of the table."""
    if value is None:
        return ""
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    return f"{value:.5g}" if unit == "" else f"{value:.{DIGITS[unit]}f} {unit}"


def table_of(rows):
    """The rows as a Markdown table."""
    cells = [
        {
            "case": row["case"],
            "claim": row["claim"],
            "predicted": spell(row["predicted"], row["unit"]),
            "measured": spell(row["measured"], row["unit"]),
            "verdict": f"**{row['verdict']}**" if row["verdict"] == FAILS else row["verdict"],
            "remark": row["remark"].replace("|", "/"),
        }
        for row in rows
    ]
    return table(cells)


def summary_of(rows):
    """How many rows have each verdict, in words."""
    counts = collections.Counter(row["verdict"] for row in rows)
    return ", ".join(f"{verdict} {counts[verdict]}" for verdict in (PASSES, FAILS, NOT_RUN, NOTED) if counts[verdict])
