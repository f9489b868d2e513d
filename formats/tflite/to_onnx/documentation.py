"""The table of operators in docs/tflite-operators.md: `python -m nibblecast.formats.tflite.to_onnx.documentation`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from nibblecast.formats.tflite.schema import BUILTIN_OPERATORS
from nibblecast.formats.tflite.to_onnx.operators import LOWERINGS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tflite-operators.md"
BEGIN, END = "<!-- operators -->\n", "<!-- end -->\n"

_NOT_SEEN = "not met in a model yet"
#: Why there is no lowering, for groups of operators.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        name: reason
        for names, reason in (
            (
                "HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_LOOKUP HASHTABLE_SIZE LSH_PROJECTION SKIP_GRAM "
                "EMBEDDING_LOOKUP_SPARSE CONCAT_EMBEDDINGS",
                "tables of strings or hashes, which ONNX has not",
            ),
            (
                "RANDOM_STANDARD_NORMAL RANDOM_UNIFORM MULTINOMIAL STABLEHLO_RNG_BIT_GENERATOR",
                "random numbers, which no two runtimes draw alike",
            ),
            ("RFFT2D REAL IMAG COMPLEX_ABS", "complex numbers, which hardly an ONNX operator takes"),
            ("BITCAST", "in ONNX since opset 26 only"),
            ("CALL DELEGATE PLACEHOLDER_FOR_GREATER_OP_CODES", "not found in files"),
            ("CUSTOM", "known to its author only: --opt custom=DOMAIN writes it as it is"),
        )
        for name in names.split()
    }
)


def table() -> str:
    """One row for each builtin operator; operators that become ONNX come first."""
    lines = ["| operator | becomes | limits |", "|---|---|---|"]
    lines += [f"| {name} | {found.how} | {found.limits} |" for name, found in sorted(LOWERINGS.items())]
    lines += ["", "| operator | why not |", "|---|---|"]
    missing = sorted(name for name in set(BUILTIN_OPERATORS) - set(LOWERINGS) if not name.startswith("STABLEHLO_"))
    lines += [f"| {name} | {REASONS.get(name, _NOT_SEEN)} |" for name in missing]
    lines.append("| STABLEHLO_…, save STABLEHLO_COMPOSITE | experimental: converters write them only when told to |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the table into the page."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
