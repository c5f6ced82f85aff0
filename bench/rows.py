"""A file of results that can be made again in parts: JSON lines, one for every value of the key."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    parser.add_argument("--only", metavar="REGEX", default="", help="formats to make; the other rows of the file stay")
    parser.add_argument("--ours", action="store_true", help="precal's formats alone; no other package is imported")
    parser.add_argument("--missing", action="store_true", help="only rows that the file does not have yet")
    parser.add_argument("--out", type=Path, default=out)


class Results:
    """Rows in their file. A new row takes the place of the one with its key, and is on the disk at once.

    Args:
        args: what `add_arguments` added.  key: names of the fields that tell rows apart; "format" and "source" too.
    """

    def __init__(self, args: argparse.Namespace, key: tuple[str, ...]) -> None:
        self.path: Path = args.out
        self.key, self.only, self.missing = key, re.compile(args.only), args.missing
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.made: set[tuple[Any, ...]] = set()
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[self.of(row)] = row

    def of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)

    def wants(self, *rows: Row) -> bool:
        """Whether the rows with these keys, all of one format, are to be made."""
        if not self.only.search(rows[0]["format"]):
            return False
        return not self.missing or any(self.of(row) not in self.rows for row in rows)

    def put(self, row: Row) -> None:
        self.rows[self.of(row)] = row
        self.made.add(self.of(row))
        self._write()

    def drop_gone(self) -> None:
        """Forget formats that no longer exist: not made by a run that made the others of their package and case."""
        if self.missing:
            return
        ran = {self._case(row) for key, row in self.rows.items() if key in self.made}
        gone = [
            key
            for key, row in self.rows.items()
            if key not in self.made and self.only.search(row["format"]) and self._case(row) in ran
        ]
        for key in gone:
            print(f"gone: {' '.join(map(str, key))}")
            del self.rows[key]
        if gone:
            self._write()

    def _case(self, row: Row) -> tuple[Any, ...]:
        package = row["source"].rsplit(" ", 1)[0]  # without its version
        return (package, *(row[name] for name in self.key if name != "format"))

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()), encoding="utf-8")
        os.replace(part, self.path)


# ---- reading them ----------------------------------------------------------------------------------------------------


def source(row: Row) -> str:
    machine = f"{row['cpu']} ({row['isa']}), torch {row['torch']}, precal {row['precal']}"
    return f"{row['date']}, {machine}; `{row['command'].strip()}`"


def ours(row: Row) -> bool:
    """precal's own recipe; the published one and plain rounding, which precal also has, are beside the peers."""
    return str(row["format"]).startswith("precal g")


def panels(data: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["model"], r["text"]) for r in data))


def in_panel(data: list[Row], panel: tuple[str, str]) -> list[Row]:
    return [r for r in data if (r["model"], r["text"]) == panel]


def frontier(data: list[Row]) -> list[Row]:
    """The rows that no other with fewer bits beats in KLD, by bits."""
    kept: list[Row] = []
    for row in sorted(data, key=lambda r: (r["bits_per_weight"], r["kld_nats"])):
        if not kept or row["kld_nats"] < kept[-1]["kld_nats"]:
            kept.append(row)
    return kept
