"""The table of tensors as C has it: rows of struct nibblecast_tensor, each member still as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nibblecast.formats.cheader.reading.source import ArrayText, Declarations
from nibblecast.formats.cheader.reading.tokens import Token, Tokens, corrupt, string_bytes

#: The members of struct nibblecast_tensor in templates/nibblecast.h, in order.
MEMBERS = (
    *("name", "data", "count", "shape", "block_shape", "grid", "scale", "zero_point", "zero_point_real", "offset"),
    *("codebook", "group_index", "kind", "bits", "rank", "granularity", "axis", "packing"),
)

_WANTED = f"the {len(MEMBERS)} members, {MEMBERS[0]} to {MEMBERS[-1]}"
_NULL = (b"NULL", b"nullptr", b"0")
_MOST_TOKENS = 256  # of one member: the literals of a name, say


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One tensor of the table: `members` by name; what is not there is 0, as in C."""

    table: ArrayText
    offset: int
    members: Mapping[str, tuple[Token, ...]]

    def text(self, member: str) -> str:
        """A string member. Raises CorruptFile when it is none."""
        literals = self.members.get(member, ())
        if not literals or any(token.kind != "string" or token.text[:1] != b'"' for token in literals):
            raise corrupt(
                self.table.file, self.offset, f"{self.table.name} has an entry whose {member} is not a string"
            )
        parts = [string_bytes(token.text) for token in literals]
        if any(part is None for part in parts):
            raise corrupt(self.table.file, self.offset, f"the {member} holds an escape that is none of C's")
        # UTF-8 that is cut at the longest string C allows ends in the middle of a character
        whole = b"".join(part for part in parts if part is not None)
        try:
            return whole.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return whole.decode("utf-8", "ignore")

    def number(self, member: str, declarations: Declarations) -> int:
        """An integer member. Raises CorruptFile when it is none."""
        given = self.members.get(member)
        if given is None:
            return 0
        if len(given) != 1:
            raise corrupt(
                self.table.file, self.offset, f"{self.table.name} has an entry whose {member} is not a number"
            )
        return declarations.integer(given[0].text, self.table.file, given[0].offset)

    def array(self, member: str) -> str | None:
        """The name of the array that a member points to; None for NULL. Raises CorruptFile for anything else."""
        given = self.members.get(member)
        if given is None or (len(given) == 1 and given[0].text in _NULL):
            return None
        if len(given) != 1 or given[0].kind != "name":
            raise corrupt(
                self.table.file, self.offset, f"{self.table.name} has an entry whose {member} is not an array"
            )
        return given[0].text.decode("ascii")


def rows_of(table: ArrayText) -> Iterator[Row]:
    """The rows of a table. Raises CorruptFile for what is none."""
    tokens = iter(Tokens(table.file, table.start, table.stop))
    comma_due = False
    for token in tokens:
        if token.text == b"{" and not comma_due:
            yield Row(table, token.offset, _members(table, token, tokens))
            comma_due = True
        elif token.text == b"," and comma_due:
            comma_due = False
        else:
            raise corrupt(table.file, token.offset, f"{table.name} holds something that is not an entry in braces")


def _members(table: ArrayText, opening: Token, tokens: Iterator[Token]) -> dict[str, tuple[Token, ...]]:
    members: dict[str, tuple[Token, ...]] = {}
    given: list[Token] = []
    designated = False
    for token in tokens:
        if token.text not in (b",", b"}") or token.kind != "mark":
            given.append(token)
            if len(given) > _MOST_TOKENS or token.text in (b"{", b";"):
                raise corrupt(table.file, token.offset, f"{table.name} has an entry that is not a list of values")
            continue
        if given:
            designated = designated or given[0].text == b"."
            name = _name_of(given, len(members))
            if name not in MEMBERS or name in members:
                raise corrupt(table.file, token.offset, f"{table.name} has an entry with more than {_WANTED}")
            members[name] = tuple(given[3:] if designated else given)
        elif token.text == b",":
            raise corrupt(table.file, token.offset, f"{table.name} has an entry with nothing between two commas")
        if token.text == b"}":
            if not designated and len(members) < len(MEMBERS):
                raise corrupt(table.file, token.offset, f"{table.name} has an entry with less than {_WANTED}")
            return members
        given = []
    raise corrupt(table.file, opening.offset, f"an entry of {table.name} does not end")


def _name_of(value: list[Token], position: int) -> str | None:
    """The member that a value is for: by its name in `.name = value`, else by its position."""
    if value[0].text == b"." and len(value) > 3 and value[1].kind == "name" and value[2].text == b"=":
        return value[1].text.decode("ascii")
    return MEMBERS[position] if position < len(MEMBERS) and value[0].text != b"." else None
