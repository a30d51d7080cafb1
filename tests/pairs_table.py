"""Write `docs/pairs.md`: `python -m tests.pairs_table`."""

from itertools import groupby
from pathlib import Path

from tests.pairs import PAIRS

PATH = Path(__file__).parents[1] / "docs" / "pairs.md"
HEAD = """# Which callbacks go together

Every pair of callbacks, in both orders, is trained, stopped, resumed and compared by `tests/test_pairs.py`.

- **works**: both do all that they promise, and a resumed run ends in the same bits as one that was not interrupted.
- **ordered**: the same, because one gives way to the other, as said.
- **refused**: an error before the first step, with these words and with how to mend it.

This file is written by `python -m tests.pairs_table` from `tests/pairs.py`.
"""


def table():
    """The text of the file."""
    parts = [HEAD]
    for kinds, pairs in groupby(sorted(PAIRS, key=lambda pair: pair.kinds()), key=lambda pair: pair.kinds()):
        rows = [f"| `{one.first}` | `{one.second}` | {one.verdict} | {one.why} |" for one in pairs]
        parts += [f"\n## {' and '.join(kinds)}\n", "| one | other | | why |", "|---|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(table(), encoding="utf-8")
    print(f"wrote {PATH.name}: {len(PAIRS)} pairs")
