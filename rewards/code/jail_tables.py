"""Arrays of numpy and tables of pandas as JSON, between the sandbox of a solution and that of its tests.

They cross by their labels, types and values. Nothing is pickled, as a pickle of the solution could run code.
"""

import importlib
from collections.abc import Callable
from typing import Any

NATIVE = "biufcSUmM"  # kinds of numpy's types without references to objects
Convert = Callable[[Any], Any]


def encode(value: Any, encode_item: Convert) -> Any:
    """Return an array or a table as JSON; None for anything else."""
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if package == "numpy" and hasattr(value, "dtype") and not isinstance(value, type):
        return _encode_numpy(value, encode_item)
    name = kind.__name__
    if package != "pandas":
        return None
    if name == "DataFrame":
        columns = [_encode_values(value.iloc[:, number], encode_item) for number in range(value.shape[1])]
        return {"frame": [encode_item(value.columns), encode_item(value.index), columns]}
    if name == "Series":
        return {"series": [_encode_values(value, encode_item), encode_item(value.index), encode_item(value.name)]}
    if name == "MultiIndex":
        levels = [_encode_values(value.get_level_values(number), encode_item) for number in range(value.nlevels)]
        return {"multi_index": [levels, [encode_item(name) for name in value.names]]}
    if name == "RangeIndex":
        return {"range_index": [value.start, value.stop, value.step, encode_item(value.name)]}
    if name.endswith("Index") and hasattr(value, "inferred_type"):
        frequency = getattr(value, "freqstr", None) if name in ("DatetimeIndex", "TimedeltaIndex") else None
        return {"index": [_encode_values(value, encode_item), encode_item(value.name), frequency]}
    if name == "Categorical" or name.endswith("Array"):
        return {"extension": _encode_values(value, encode_item)}
    return _encode_scalar(value, encode_item)


def decode(kind: str, content: Any, decode_item: Convert) -> Any:
    """Return what `encode` encoded; raise some exception for any other input."""
    if kind in ("ndarray", "scalar"):
        numpy = importlib.import_module("numpy")
        array = numpy.frombuffer(bytes.fromhex(content[2]), content[0]).reshape(content[1]).copy()
        return array if kind == "ndarray" else array[()]
    if kind == "objects":
        numpy = importlib.import_module("numpy")
        flat = numpy.empty(len(content[1]), object)
        for number, item in enumerate(content[1]):
            flat[number] = decode_item(item)
        return flat.reshape(content[0])
    pandas = importlib.import_module("pandas")
    if kind == "frame":
        columns, index = decode_item(content[0]), decode_item(content[1])
        values = {number: _decode_values(tree, decode_item) for number, tree in enumerate(content[2])}
        frame = pandas.DataFrame(values, index=index)
        frame.columns = columns
        return frame
    if kind == "series":
        values, index, name = _decode_values(content[0], decode_item), decode_item(content[1]), decode_item(content[2])
        return pandas.Series(values, index=index, name=name)
    if kind == "multi_index":
        levels = [_decode_values(tree, decode_item) for tree in content[0]]
        return pandas.MultiIndex.from_arrays(levels, names=[decode_item(name) for name in content[1]])
    if kind == "range_index":
        return pandas.RangeIndex(*content[:3], name=decode_item(content[3]))
    if kind == "index":
        index = pandas.Index(_decode_values(content[0], decode_item), name=decode_item(content[1]))
        if content[2]:
            index.freq = content[2]
        return index
    if kind == "extension":
        return _decode_values(content, decode_item)
    return _decode_scalar(pandas, kind, content, decode_item)


def _encode_numpy(value: Any, encode_item: Convert) -> Any:
    if value.dtype.kind == "O":
        return {"objects": [list(value.shape), [encode_item(item) for item in value.ravel().tolist()]]}
    if value.dtype.kind not in NATIVE:
        return None
    kind = "ndarray" if type(value).__name__ == "ndarray" else "scalar"
    return {kind: [value.dtype.str, list(value.shape), value.tobytes().hex()]}


def _encode_values(value: Any, encode_item: Convert) -> Any:
    """Return the values of a column or an index: a categorical, an array of numpy, or items with the name of a type."""
    kind = value.dtype
    if type(kind).__name__ == "CategoricalDtype":
        held = getattr(value, "array", value)
        categorical = getattr(held, "_data", held) if type(held).__name__ != "Categorical" else held
        codes = [int(code) for code in categorical.codes]
        return ["category", codes, encode_item(kind.categories), bool(kind.ordered)]
    if getattr(kind, "kind", "") in NATIVE and type(kind).__module__.startswith("numpy"):
        return ["numpy", encode_item(value.to_numpy())]
    return ["items", str(kind), [encode_item(item) for item in value]]


def _decode_values(tree: Any, decode_item: Convert) -> Any:
    pandas = importlib.import_module("pandas")
    if tree[0] == "category":
        return pandas.Categorical.from_codes(tree[1], categories=decode_item(tree[2]), ordered=tree[3])
    if tree[0] == "numpy":
        return decode_item(tree[1])
    return pandas.Series([decode_item(item) for item in tree[2]], dtype=tree[1]).array


def _encode_scalar(value: Any, encode_item: Convert) -> Any:
    name = type(value).__name__
    if name in ("NAType", "NaTType"):
        return {"missing": name[: -len("Type")]}
    if name == "Timestamp":
        zone = None if value.tzinfo is None else str(value.tzinfo)
        return {"timestamp": [int(value.value), zone, value.unit]}
    if name == "Timedelta":
        return {"pandas_timedelta": [int(value.value), value.unit]}
    if name == "Period":
        return {"period": [str(value), value.freqstr]}
    if name == "Interval":
        return {"interval": [encode_item(value.left), encode_item(value.right), value.closed]}
    return None


def _decode_scalar(pandas: Any, kind: str, content: Any, decode_item: Convert) -> Any:
    if kind == "missing":
        return {"NA": pandas.NA, "NaT": pandas.NaT}[content]
    if kind == "timestamp":
        return pandas.Timestamp(content[0], tz=content[1]).as_unit(content[2])
    if kind == "pandas_timedelta":
        return pandas.Timedelta(content[0]).as_unit(content[1])
    if kind == "period":
        return pandas.Period(*content)
    if kind == "interval":
        return pandas.Interval(decode_item(content[0]), decode_item(content[1]), closed=content[2])
    raise ValueError(f"no kind of value: {kind}")


def are_equal(one: Any, other: Any) -> bool:
    """Return True for equal values, where `==` of arrays or tables in them has no single truth value.

    Missing values (NaN, NaT, NA) at the same place are equal. Tables need the same labels, arrays the same shape.
    """
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        is_same_kind = isinstance(one, list) == isinstance(other, list)
        return is_same_kind and len(one) == len(other) and all(map(are_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_equal(item, other[key]) for key, item in one.items())
    if is_table(one) or is_table(other):
        return type(one) is type(other) and _are_tables_equal(one, other)
    if _is_index(one) or _is_index(other):
        return _is_index(one) and _is_index(other) and bool(one.equals(other))
    return bool(one == other)


def _are_tables_equal(one: Any, other: Any) -> bool:
    if type(one).__name__ == "ndarray":
        numpy = importlib.import_module("numpy")
        if one.dtype.kind == "O" or other.dtype.kind == "O":
            return one.shape == other.shape and all(map(are_equal, one.ravel().tolist(), other.ravel().tolist()))
        has_missing = {one.dtype.kind, other.dtype.kind} <= set("fcmM")
        return bool(numpy.array_equal(one, other, equal_nan=has_missing))
    if one.shape != other.shape or not all(map(lambda a, b: a.equals(b), one.axes, other.axes)):
        return False
    if one.ndim == 2:
        return all(_are_tables_equal(one.iloc[:, number], other.iloc[:, number]) for number in range(one.shape[1]))
    return bool(one.equals(other)) or all(
        (left is right) or (left != left and right != right) or are_equal(left, right)
        for left, right in zip(one.astype(object), other.astype(object), strict=True)
    )


def is_table(value: Any) -> bool:
    """Return True for an array, a Series or a DataFrame, which a function can change in place."""
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    return kind in ("numpy.ndarray", "pandas.DataFrame", "pandas.Series")


def _is_index(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas" and type(value).__name__.endswith("Index")


def assign(target: Any, value: Any) -> None:
    """Give an array or a table the contents of `value` in place. An array keeps its shape."""
    if type(target).__name__ != "ndarray":
        target._update_inplace(value)  # as pandas does for the option `inplace` of its methods
    elif target.shape == value.shape and target.dtype == value.dtype:
        target[...] = value
