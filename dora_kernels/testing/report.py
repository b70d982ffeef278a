"""The report of a check: a row for each tensor and promise, as a table, as JSON, as an exception."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dora_kernels.testing.measure import Comparison

COLUMNS = ("check", "tensor", "rms error", "PyTorch's", "max error", "PyTorch's", "ratio", "verdict")


@dataclass(frozen=True)
class Row:
    """One promise checked for one tensor.

    check: the promise ("accuracy", "finite differences", "repeat", "inputs", ...); subject: the tensor. ok: None if it
    could not be checked here. reason: of a failure, or of not checking. comparison: the errors, if there are any.
    """

    check: str
    subject: str
    ok: bool | None
    reason: str = ""
    comparison: Comparison | None = None

    @property
    def verdict(self) -> str:
        """ "ok", "FAILED: ..." or "not checked: ..."."""
        if self.ok:
            return "ok"
        return f"{'not checked' if self.ok is None else 'FAILED'}: {self.reason}"

    def cells(self) -> tuple[str, ...]:
        """One text for each of COLUMNS."""
        c = self.comparison
        numbers = () if c is None else (c.error, c.yardstick, c.max_error, c.max_yardstick)
        texts = [f"{number:.2e}" for number in numbers] or [""] * 4
        ratio = "" if c is None or not math.isfinite(c.ratio) else f"{c.ratio:.2f}"
        return (self.check, self.subject, *texts, ratio, self.verdict)


@dataclass(frozen=True)
class Report:
    """The rows of one check; prints as a table."""

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """True if something was checked and nothing failed."""
        return any(row.ok for row in self.rows) and not self.failures

    @property
    def failures(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.ok is False]

    def raise_if_failed(self) -> "Report":
        """Return this report if it is ok, else raise AssertionError with the whole table."""
        if not self.ok:
            raise AssertionError(f"\n{self}")
        return self

    def to_json(self) -> dict[str, object]:
        """A dict that json.dumps takes: an infinite error is the string "inf"."""
        return {"title": self.title, "ok": self.ok, "rows": [_plain(row) for row in self.rows]}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAILED: {len(self.failures)} of {len(self.rows)}"
        return "\n".join([f"{self.title}: {verdict}", *aligned([COLUMNS, *(row.cells() for row in self.rows)])])


def _plain(row: Row) -> dict[str, object]:
    comparison = row.comparison
    errors = {} if comparison is None else asdict(comparison) | {"limit": comparison.limit, "ratio": comparison.ratio}
    errors.pop("name", None)
    finite = {key: value if math.isfinite(value) else str(value) for key, value in errors.items()}
    return {"check": row.check, "tensor": row.subject, "ok": row.ok, "reason": row.reason} | finite


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, each column as wide as its widest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return ["  " + line.rstrip() for line in lines]
