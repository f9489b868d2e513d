"""ONNX file -> `ParsedModel`: headers only, every length and name checked, no payload touched."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from converters.errors import CorruptFile, Unsupported, printable
from formats.onnx import schema
from formats.onnx.graph import Graph, Node, ParsedModel, TensorHeader
from formats.onnx.wire import Range, Record, decode

_DEEPEST = 64  # graphs within graphs; exporters make three or four
_MOST_AXES = 64  # NumPy's limit


def parse(view: memoryview, path: Path) -> ParsedModel:
    """The model in a whole file's bytes. Raises CorruptFile and Unsupported, naming `path`."""
    try:
        return _model(view)
    except (CorruptFile, Unsupported) as error:
        error.path = error.path or path
        raise


def _model(view: memoryview) -> ParsedModel:
    if not len(view):
        raise CorruptFile("is empty: this is no ONNX model")
    record = decode(view, Range(0, len(view)), schema.MODEL)
    graphs = record.ranges("graph")
    if len(graphs) != 1 or "ir_version" not in record.values:
        raise CorruptFile(
            f"holds {len(graphs)} graphs and {len(record.ints('ir_version'))} IR versions, not one of each"
        )
    graph = _graph(view, graphs[0], 0)
    _check_names(graph, ())
    producer = f"{record.text('producer_name')} {record.text('producer_version')}".strip()
    return ParsedModel(graph, producer, _entries(view, record, "metadata_props"))


def _graph(view: memoryview, where: Range, depth: int) -> Graph:
    if depth > _DEEPEST:
        raise Unsupported(f"graphs are nested deeper than {_DEEPEST} levels: this is no model that an exporter makes")
    record = decode(view, where, schema.GRAPH)
    sparse = []
    for place in record.ranges("sparse_initializer"):
        values = decode(view, place, schema.SPARSE_TENSOR).ranges("values")
        sparse += [decode(view, value, schema.TENSOR).text("name") for value in values]
    return Graph(
        nodes=tuple(_node(view, place, depth) for place in record.ranges("node")),
        initializers=tuple(_tensor(view, place) for place in record.ranges("initializer")),
        inputs=_names(view, record, "input"),
        outputs=_names(view, record, "output"),
        sparse=tuple(sparse),
    )


def _node(view: memoryview, where: Range, depth: int) -> Node:
    record = decode(view, where, schema.NODE)
    op_type, outputs = record.text("op_type"), tuple(record.texts("output"))
    if not op_type:
        raise CorruptFile(f"byte {where.start}: a node names no operator: the file is damaged")
    integers: dict[str, int] = {}
    bodies: list[Graph] = []
    constant = None
    for place in record.ranges("attribute"):
        attribute = decode(view, place, schema.ATTRIBUTE)
        name = attribute.text("name")
        if "i" in attribute.values:
            integers[name] = attribute.integer("i", 0)
        bodies += [_graph(view, body, depth + 1) for body in attribute.ranges("g") + attribute.ranges("graphs")]
        if op_type == "Constant" and name == "value" and attribute.ranges("t") and outputs:
            constant = _tensor(view, attribute.ranges("t")[-1], outputs[0])
    domain = record.text("domain")
    return Node(op_type, tuple(record.texts("input")), outputs, integers, domain, tuple(bodies), constant)


def _tensor(view: memoryview, where: Range, name: str = "") -> TensorHeader:
    record = decode(view, where, schema.TENSOR)
    name = name or record.text("name")
    dims = tuple(record.ints("dims"))
    if len(dims) > _MOST_AXES or any(size < 0 for size in dims):
        shown = f"{dims[:8]}{'…' if len(dims) > 8 else ''}"
        raise CorruptFile(f"dims {shown}: at most {_MOST_AXES} sizes, none negative, are needed", tensor=name)
    external = None
    if record.integer("data_location", 0) == schema.DATA_LOCATION_EXTERNAL:
        external = _entries(view, record, "external_data")
    properties = _entries(view, record, "metadata_props")
    return TensorHeader(name, record.integer("data_type", 0), dims, record, external, properties)


def _names(view: memoryview, record: Record, field: str) -> tuple[str, ...]:
    return tuple(decode(view, place, schema.VALUE_INFO).text("name") for place in record.ranges(field))


def _entries(view: memoryview, record: Record, field: str) -> Mapping[str, str]:
    entries = (decode(view, place, schema.ENTRY) for place in record.ranges(field))
    return {entry.text("key"): entry.text("value") for entry in entries}


def _check_names(graph: Graph, outer: tuple[Set[str], ...]) -> None:
    """Raises CorruptFile when a node takes, or the graph gives, what nothing makes, or a name has two makers."""
    made = [*graph.inputs, *graph.sparse, *(name for node in graph.nodes for name in node.outputs if name)]
    initializers = {tensor.name for tensor in graph.initializers}
    if len(initializers) != len(graph.initializers) or "" in initializers:
        raise CorruptFile("an initializer has no name, or the name of another one: the file is damaged")
    known = (initializers.union(made), *outer)
    for node in graph.nodes:
        for name in node.inputs:
            if name and not any(name in names for names in known):
                raise CorruptFile(f"a {node.op_type} takes '{printable(name)}', which nothing in the file makes")
        for body in node.bodies:
            _check_names(body, known)
    for name in graph.outputs:
        if not any(name in names for names in known):
            raise CorruptFile(f"the graph's output '{printable(name)}' is made by nothing in the file")
