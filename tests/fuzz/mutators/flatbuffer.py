"""Changes of TFLite's flatbuffers at every place that their schema gives a meaning: scalars, offsets, lengths, vtables.

Format: https://flatbuffers.dev/internals. Edits are made in place; what needs more room is put behind the end, where
an offset can always lead.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from random import Random

from tests.fuzz.mutators.havoc import havoc
from tests.fuzz.mutators.values import edited, integer, real, text

#: The tables of schema.fbs (LiteRT 2.3), by slot: a format of `struct`, "str", a table's name, or any of these in
#: brackets, which is a vector. "*" is a table of whatever fields.
SCHEMA: dict[str, dict[int, str]] = {
    "Model": {
        0: "I",
        1: "[OperatorCode]",
        2: "[SubGraph]",
        3: "str",
        4: "[Buffer]",
        6: "[Metadata]",
        7: "[Signature]",
        8: "[Group]",
        9: "[External]",
    },
    "OperatorCode": {0: "b", 1: "str", 2: "i", 3: "i"},
    "SubGraph": {0: "[Tensor]", 1: "[i]", 2: "[i]", 3: "[Operator]", 4: "str"},
    "Tensor": {
        0: "[i]",
        1: "b",
        2: "I",
        3: "str",
        4: "Quantization",
        5: "b",
        6: "Sparsity",
        7: "[i]",
        8: "b",
        10: "I",
    },
    "Quantization": {0: "[f]", 1: "[f]", 2: "[f]", 3: "[q]", 4: "B", 5: "*", 6: "i"},
    "Sparsity": {0: "[i]", 1: "[i]", 2: "[Dimension]"},
    "Dimension": {0: "b", 1: "i", 2: "B", 3: "*", 4: "B", 5: "*"},
    "Operator": {
        0: "I",
        1: "[i]",
        2: "[i]",
        3: "B",
        4: "*",
        5: "[B]",
        6: "B",
        7: "[B]",
        8: "[i]",
        9: "Q",
        10: "Q",
        11: "B",
        12: "*",
    },
    "Buffer": {0: "[B]", 1: "Q", 2: "Q"},
    "Metadata": {0: "str", 1: "I"},
    "Signature": {0: "[Map]", 1: "[Map]", 2: "str", 4: "I"},
    "Map": {0: "str", 1: "I"},
    "Group": {0: "str"},
    "External": {0: "I", 1: "I", 2: "Q", 3: "Q", 4: "str"},
    "*": dict.fromkeys(range(16), "i"),
}
#: Kind of a place, where it is, and what it is of: a format, or what an offset leads to.
Place = tuple[str, int, str]
_MOST_PLACES = 1 << 14
_MOST_ELEMENTS = 24


class _Broken(Exception):
    pass


def model(data: bytes, other: bytes, random: Random) -> bytes:
    """A flatbuffer with a few places changed."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = _places(made)
        if len(places) < 2:
            return havoc(bytes(made), other, random)
        kinds = sorted({kind for kind, _, _ in places})
        kind = random.choice(kinds)  # there are many more elements than offsets
        with suppress(_Broken, struct.error):  # what an offset leads to may be anything
            _edit(made, random.choice([place for place in places if place[0] == kind]), places, random)
    return bytes(made)


def _edit(made: bytearray, place: Place, places: list[Place], random: Random) -> None:
    kind, at, of = place
    if kind == "vtable":
        struct.pack_into("<H", made, at, random.choice((0, 0, 4, 8, 12, integer(random, most=0xFFFF))))
    elif kind == "offset":
        _lead_elsewhere(made, at, of, places, random)
    elif of in "fd":
        struct.pack_into("<f" if of == "f" else "<d", made, at, _float32(real(random)) if of == "f" else real(random))
    else:
        _put(made, at, of, integer(random, _get(made, at, of), (1 << 8 * struct.calcsize(of)) - 1))


def _lead_elsewhere(made: bytearray, at: int, of: str, places: list[Place], random: Random) -> None:
    """Where the offset at `at` leads: to what another one of its kind leads to, to a changed copy of what it led to, or
    anywhere."""
    choice = random.random()
    target = at + _get(made, at, "I")
    alike = [position for kind, position, name in places if kind == "offset" and name == of and position != at]
    if choice < 0.3 and alike:
        same = random.choice(alike)
        target = same + _get(made, same, "I")
    elif choice < 0.8 and of == "str":
        old = bytes(made[target + 4 : target + 4 + _get(made, target, "I")])
        new = text(random, old.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
        target = _append(made, struct.pack("<I", len(new)) + new + b"\0")
    elif choice < 0.8 and of.startswith("["):
        target = _append_vector(made, target, of[1:-1], random)
    else:
        target = at + integer(random, target - at, 0xFFFFFFFF)
    _put(made, at, "I", target - at)


def _append_vector(made: bytearray, vector: int, of: str, random: Random) -> int:
    """A vector like the one at `vector`, with elements changed, dropped, doubled."""
    form = of if len(of) == 1 and of != "*" else "I"
    count = min(_get(made, vector, "I"), 1 << 12)
    width = struct.calcsize(form)
    values = list(struct.unpack_from(f"<{count}{form}", made, vector + 4))
    if form == "f":
        values = edited(random, values, list(values), lambda _: _float32(real(random)))
    elif form == of:
        most = (1 << 8 * width) - 1
        sign = (most + 1) // 2 if form.islower() else 0
        values = edited(random, values, list(values), lambda value: integer(random, int(value), most) - sign)
        values = [(int(value) + sign) % (most + 1) - sign for value in values]
    else:  # offsets, from where each of them lies
        targets = [vector + 4 + width * index + int(value) for index, value in enumerate(values)]
        targets = edited(random, targets, targets, lambda value: value)
        start = len(made) + -len(made) % 8 + 4
        values = [(target - start - width * index) % (1 << 32) for index, target in enumerate(targets)]
    return _append(made, struct.pack(f"<I{len(values)}{form}", len(values), *values))


def _append(made: bytearray, content: bytes) -> int:
    made += bytes(-len(made) % 8)
    made += content
    return len(made) - len(content)


def _places(data: bytearray) -> list[Place]:
    """Every place that has a meaning, as far as the file can be followed."""
    found: list[Place] = []
    seen: set[tuple[int, str]] = set()

    def visit(position: int, of: str) -> None:
        if (position, of) in seen or len(found) > _MOST_PLACES:
            return
        seen.add((position, of))
        with suppress(_Broken):
            if of == "str":
                found.append(("length", position, "I"))
            elif of.startswith("["):
                visit_vector(position, of[1:-1])
            else:
                visit_table(position, of)

    def visit_vector(position: int, of: str) -> None:
        found.append(("length", position, "I"))
        is_scalar = len(of) == 1 and of != "*"
        width = struct.calcsize(of) if is_scalar else 4
        for index in range(min(_get(data, position, "I"), _MOST_ELEMENTS)):
            at = position + 4 + width * index
            if is_scalar:
                found.append(("element", at, of))
            else:
                follow(at, of)

    def visit_table(position: int, of: str) -> None:
        vtable = position - _get(data, position, "i")
        found.append(("table", position, "i"))
        slots = (_get(data, vtable, "H") - 4) // 2
        for slot in range(min(slots, 32)):
            offset = _get(data, vtable + 4 + 2 * slot, "H")
            found.append(("vtable", vtable + 4 + 2 * slot, "H"))
            form = SCHEMA[of].get(slot)
            if offset and form is not None:
                if len(form) == 1 and form != "*":
                    found.append(("scalar", position + offset, form))
                else:
                    follow(position + offset, form)

    def follow(at: int, of: str) -> None:
        target = at + _get(data, at, "I")
        found.append(("offset", at, of))
        visit(target, of)

    with suppress(_Broken, RecursionError):
        follow(0, "Model")
    return [place for place in found if 0 <= place[1] <= len(data) - 8]


def _get(data: bytearray, at: int, form: str) -> int:
    try:
        return int(struct.unpack_from("<" + form, data, at)[0]) if at >= 0 else _raise()
    except struct.error:
        return _raise()


def _raise() -> int:
    raise _Broken


def _put(data: bytearray, at: int, form: str, value: int) -> None:
    width = struct.calcsize(form)
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf")
