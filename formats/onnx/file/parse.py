"""ONNX file -> `ParsedModel`: reads headers only, checks every length and name, and touches no payload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from nibblecast.converters.errors import CorruptFile, Unsupported, located, printable
from nibblecast.converters.input.shapes import MOST_DIMENSIONS, checked_shape
from nibblecast.converters.metadata import Port
from nibblecast.formats.onnx.file import schema
from nibblecast.formats.onnx.file.graph import Node, ParsedGraph, ParsedModel, TensorHeader
from nibblecast.formats.onnx.file.wire import Message, Range, decode

_DEEPEST = 64  # graphs within graphs; exporters make three or four
_LONGEST_TEXT = 64  # bytes of a string attribute that names a choice; longer ones hold whole programs


def parse(view: memoryview, path: Path) -> ParsedModel:
    """The model from the bytes of a whole file. Raises CorruptFile and Unsupported, naming `path`."""
    with located(path=path):
        return _model(view)


def _model(view: memoryview) -> ParsedModel:
    if not len(view):
        raise CorruptFile("is empty: this is not an ONNX model")
    record = decode(view, Range(0, len(view)), schema.MODEL)
    graphs = record.ranges("graph")
    if len(graphs) != 1 or "ir_version" not in record.values:
        raise CorruptFile(
            f"holds {len(graphs)} graphs and {len(record.ints('ir_version'))} IR versions, not one of each"
        )
    graph = _graph(view, graphs[0], 0)
    _check_names(graph, ())
    initializers = {header.name for header in graph.initializers}
    functions = [_function(view, place) for place in record.ranges("functions")]
    names = Counter(key for key, _ in functions)  # the name alone does not identify an overloaded function
    producer = f"{record.text('producer_name')} {record.text('producer_version')}".strip()
    return ParsedModel(
        graph,
        producer,
        _entries(view, record, "metadata_props"),
        tuple(body for _, body in functions),
        tuple(port for port in _ports(view, graphs[0], "input") if port.name not in initializers),
        tuple(_ports(view, graphs[0], "output")),
        _opsets(view, record),
        record.integer("ir_version", 0),
        {key: body for key, body in functions if names[key] == 1},
    )


def _opsets(view: memoryview, record: Message) -> Mapping[str, int]:
    imports = [decode(view, place, schema.OPERATOR_SET) for place in record.ranges("opset_import")]
    return {domain_of(each.text("domain")): each.integer("version", 0) for each in imports}


def domain_of(domain: str) -> str:
    """The canonical name of a domain, because ONNX's own has two names."""
    return "" if domain == "ai.onnx" else domain


def _function(view: memoryview, where: Range) -> tuple[tuple[str, str], ParsedGraph]:
    """A function's domain and name, and its body as a graph without initializers."""
    record = decode(view, where, schema.FUNCTION)
    nodes = tuple(_node(view, place, 1) for place in record.ranges("node"))
    graph = ParsedGraph(nodes, (), tuple(record.texts("input")), tuple(record.texts("output")))
    _check_names(graph, ())
    return (domain_of(record.text("domain")), record.text("name")), graph


def _graph(view: memoryview, where: Range, depth: int) -> ParsedGraph:
    if depth > _DEEPEST:
        raise Unsupported(
            f"graphs are nested deeper than {_DEEPEST} levels: this is not a model that an exporter makes"
        )
    record = decode(view, where, schema.GRAPH)
    sparse = []
    for place in record.ranges("sparse_initializer"):
        values = decode(view, place, schema.SPARSE_TENSOR).ranges("values")
        sparse += [decode(view, value, schema.TENSOR).text("name") for value in values]
    return ParsedGraph(
        nodes=tuple(_node(view, place, depth) for place in record.ranges("node")),
        initializers=tuple(tensor_header(view, place) for place in record.ranges("initializer")),
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
    floats: dict[str, float] = {}
    lists: dict[str, tuple[int, ...]] = {}
    texts: dict[str, str] = {}
    bodies: list[ParsedGraph] = []
    constant = None
    has_tensors = is_parametric = False
    for place in record.ranges("attribute"):
        attribute = decode(view, place, schema.ATTRIBUTE)
        name = attribute.text("name")
        if "i" in attribute.values:
            integers[name] = attribute.integer("i", 0)
        if "f" in attribute.values:
            floats[name] = attribute.floats("f")[-1]
        for text in attribute.ranges("s")[-1:]:
            if text.nbytes <= _LONGEST_TEXT:
                texts[name] = bytes(view[text.start : text.stop]).decode("utf-8", "backslashreplace")
        if "ints" in attribute.values:
            lists[name] = tuple(attribute.ints("ints"))
        bodies += [_graph(view, body, depth + 1) for body in attribute.ranges("g") + attribute.ranges("graphs")]
        is_parametric = is_parametric or "ref_attr_name" in attribute.values
        has_tensors = has_tensors or bool(attribute.ranges("t") + attribute.ranges("tensors"))
        if op_type == "Constant" and name == "value" and attribute.ranges("t") and outputs:
            constant = tensor_header(view, attribute.ranges("t")[-1], outputs[0])
    return Node(
        op_type,
        tuple(record.texts("input")),
        outputs,
        integers,
        record.text("domain"),
        tuple(bodies),
        constant,
        record.text("name"),
        has_tensors,
        floats,
        lists,
        tuple(record.ranges("attribute")),
        texts=texts,
        is_parametric=is_parametric,
    )


def tensor_header(view: memoryview, where: Range, name: str = "") -> TensorHeader:
    """A TensorProto without its payload; `name` is given for a Constant's value. Raises CorruptFile for wrong dims."""
    record = decode(view, where, schema.TENSOR)
    name = name or record.text("name")
    dims = checked_shape(record.ints("dims"), tensor=name)
    external = None
    if record.integer("data_location", 0) == schema.DATA_LOCATION_EXTERNAL:
        external = _entries(view, record, "external_data")
    properties = _entries(view, record, "metadata_props")
    return TensorHeader(name, record.integer("data_type", 0), dims, record, external, properties)


def _ports(view: memoryview, where: Range, field: str) -> Iterator[Port]:
    """The inputs or outputs of a graph, with what the file says of their types."""
    for place in decode(view, where, schema.GRAPH).ranges(field):
        record = decode(view, place, schema.VALUE_INFO)
        types = [decode(view, found, schema.TYPE).ranges("tensor_type") for found in record.ranges("type")]
        tensor = decode(view, types[-1][-1], schema.TENSOR_TYPE) if types and types[-1] else None
        number = 0 if tensor is None else tensor.integer("elem_type", 0)
        dtype = schema.DTYPES[number].name if number in schema.DTYPES else "string" if number == schema.STRING else ""
        shape = None if tensor is None or not tensor.ranges("shape") else _sizes(view, tensor.ranges("shape")[-1])
        yield Port(record.text("name"), dtype, shape)


def _sizes(view: memoryview, where: Range) -> tuple[int | str, ...]:
    places = decode(view, where, schema.SHAPE).ranges("dim")
    if len(places) > MOST_DIMENSIONS:
        raise Unsupported(f"an input or output has {len(places)} dimensions; {MOST_DIMENSIONS} are the most")
    sizes = [decode(view, size, schema.DIMENSION) for size in places]
    return tuple(s.integer("dim_value", 0) if "dim_value" in s.values else s.text("dim_param") for s in sizes)


def _names(view: memoryview, record: Message, field: str) -> tuple[str, ...]:
    return tuple(decode(view, place, schema.VALUE_INFO).text("name") for place in record.ranges(field))


def _entries(view: memoryview, record: Message, field: str) -> Mapping[str, str]:
    entries = (decode(view, place, schema.ENTRY) for place in record.ranges(field))
    return {entry.text("key"): entry.text("value") for entry in entries}


def _check_names(graph: ParsedGraph, outer: tuple[Set[str], ...]) -> None:
    """Raises CorruptFile if a node takes or the graph outputs a value that nothing makes, or if two nodes make one."""
    initializers = {tensor.name for tensor in graph.initializers}
    if len(initializers) != len(graph.initializers) or "" in initializers:
        raise CorruptFile("an initializer has no name, or the name of another one: the file is damaged")
    made = initializers.union(graph.inputs, graph.sparse)  # before IR version 4, initializers are inputs too
    for node in graph.nodes:
        for name in node.outputs:
            if name in made:
                raise CorruptFile(
                    f"a {node.op_type} makes '{printable(name)}', which something else in its graph makes"
                )
            if name:
                made.add(name)
    known = (made, *outer)
    for node in graph.nodes:
        for name in node.inputs:
            if name and not any(name in names for names in known):
                raise CorruptFile(f"a {node.op_type} takes '{printable(name)}', which nothing in the file makes")
        for body in node.bodies:
            _check_names(body, known)
    for name in graph.outputs:
        if not any(name in names for names in known):
            raise CorruptFile(f"the graph's output '{printable(name)}' is made by nothing in the file")
