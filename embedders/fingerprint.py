"""What identifies the numbers that an object computes: its code and its state, as plain JSON.

The state is read the way pickle reads it, so whatever can be sent to a worker has a fingerprint, and equal values have
equal fingerprints in every process. Code is identified by its source. Code of installed packages is identified by its
name: it changes with the package's version, which the records of shards hold.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLAIN = (bool, int, float, str, type(None))
"""What JSON holds as it is."""

PICKLE_PROTOCOL = 4


class NoFingerprint(ValueError):
    """A value has no stable representation; the message is one line that says which and why."""


def of_value(value: Any, name: str = "value") -> Any:
    """Return plain JSON that is equal for equal values, in every process.

    Args:
        value: Anything that can be pickled; functions and classes too, by their code.
        name: How errors call the value, such as `self.scale`.

    Raises:
        NoFingerprint: The value cannot be pickled, refers to itself, or its state changes from one look to the next.

    Example:
        >>> of_value({"scale": (1, 2.0)})
        {'dict': [['scale', {'tuple': [1, 2.0]}]]}
    """
    first = _of_value(value, name, ())
    if json.dumps(first) != json.dumps(_of_value(value, name, ())):
        raise NoFingerprint(f"{name} ({_type_name(value)}) looks different each time it is read")
    return first


def digest(value: Any) -> str:
    """Return 32 hexadecimal digits that identify a plain JSON value.

    Example:
        >>> digest({"model": "resnet50"}) == digest({"model": "resnet50"})
        True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def of_value_or_type(value: Any) -> Any:
    """Return the value's fingerprint, or the name of its type where it has none."""
    try:
        return of_value(value)
    except NoFingerprint:
        return {"type": _type_name(value)}


def of_class(kind: type) -> str:
    """Return the digest of a class's own body: its functions' source, and the values of its other attributes.

    The source is found by each function, not by the class: for that Python needs the module's file, which is hidden
    from the main module while worker processes start.
    """
    return _of_class(kind, ())


def of_classes(kind: type, base: type) -> dict[str, str]:
    """Return the digests of the classes from `kind` up to `base`, without those that `base` has itself.

    Whatever a class overrides, and whichever of its parents does, is in one of these digests.
    """
    ours = set(base.__mro__)
    return {f"{i} {k.__qualname__}": of_class(k) for i, k in enumerate(kind.__mro__) if k not in ours}


def cached_properties(kind: type) -> frozenset[str]:
    """Return the names of a class's cached properties: functions of its code and attributes, so they come with use."""
    return frozenset(k for c in kind.__mro__ for k, v in vars(c).items() if isinstance(v, functools.cached_property))


_CODE = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)


def _of_class(kind: type, above: tuple[int, ...]) -> str:
    above = (*above, id(kind))
    # Other names of this form are Python's own notes, some of which come with use, such as __slotnames__.
    body = {k: v for k, v in vars(kind).items() if not k.startswith("__") or isinstance(v, _CODE)}
    body.pop("_abc_impl", None)
    return _digest(repr(sorted((key, _of_member(value, above)) for key, value in body.items())))


def _of_member(member: Any, above: tuple[int, ...]) -> str:
    """An attribute of a class; by its type alone if it has no stable representation."""
    if isinstance(member, staticmethod | classmethod):
        return f"{type(member).__name__} {_of_member(member.__func__, above)}"
    if isinstance(member, property):
        return f"property {[_of_member(f, above) for f in (member.fget, member.fset, member.fdel)]}"
    if isinstance(member, functools.cached_property):
        return f"cached_property {_of_member(member.func, above)}"
    if isinstance(member, types.FunctionType):
        bound = [_or_type(value, above) for value in _bound(member)]
        return f"{_of_body(member)} {bound}"
    return _or_type(member, above)


def _or_type(value: Any, above: tuple[int, ...]) -> str:
    try:
        return json.dumps(_of_value(value, "value", above))
    except NoFingerprint:
        return _type_name(value)


def _of_value(value: Any, name: str, above: tuple[int, ...]) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, type):
        return _of_type(value, above)
    if id(value) in above:
        raise NoFingerprint(f"{name} ({_type_name(value)}) refers to itself")
    above = (*above, id(value))
    if isinstance(value, bytes | bytearray):
        return {"bytes": _digest(bytes(value))}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_of_value(v, f"{name}[{i}]", above) for i, v in enumerate(value)]}
    if type(value) in (set, frozenset):
        return {"set": sorted((_of_value(v, name, above) for v in value), key=repr)}
    if type(value) is dict:
        return {"dict": _of_items(value, name, above)}
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    if isinstance(value, types.FunctionType):
        return _of_function(value, name, above)
    if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | None):
        return {"builtin": f"{value.__module__}.{value.__qualname__}"}
    if _is_tensor(value):
        array = value.detach().cpu().contiguous()
        return {"tensor": [str(array.dtype), list(array.shape), _digest(array.reshape(-1).view(_bytes_type()).numpy())]}
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and not value.dtype.hasobject:
        return {"array": [str(value.dtype), list(value.shape), _digest(value.tobytes())]}
    return _of_reduced(value, name, above)


def _of_items(items: Mapping[Any, Any], name: str, above: tuple[int, ...]) -> list[list[Any]]:
    """Keys and values, sorted by key: two dicts of the same items are equal whatever their order."""
    pairs = [[_of_value(k, name, above), _of_value(v, f"{name}[{k!r}]", above)] for k, v in items.items()]
    return sorted(pairs, key=lambda pair: repr(pair[0]))


def _of_type(kind: type, above: tuple[int, ...]) -> Any:
    if _installed(kind.__module__):
        return {"class": f"{kind.__module__}.{kind.__qualname__}"}
    if id(kind) in above:  # one of its methods refers to it
        return {"class": kind.__qualname__}
    user = {k.__qualname__: _of_class(k, above) for k in kind.__mro__ if not _installed(k.__module__)}
    return {"class": kind.__qualname__, "source": user}


def _of_function(function: types.FunctionType, name: str, above: tuple[int, ...]) -> Any:
    """A function by its body, its defaults, and the values it closes over."""
    if _installed(function.__module__) and "<" not in function.__qualname__:  # all lambdas have one name
        return {"function": f"{function.__module__}.{function.__qualname__}"}
    return {"body": _of_body(function), "bound": [_of_value(value, name, above) for value in _bound(function)]}


def _of_body(function: types.FunctionType) -> str:
    """The digest of a function's source; of its code where there is no source file, or more than it on its lines."""
    if function.__name__ != "<lambda>":
        with contextlib.suppress(OSError, TypeError):
            return _digest(inspect.getsource(function.__code__))
    return _digest(repr(_of_code(function.__code__)))


def _bound(function: types.FunctionType) -> list[Any]:
    """Defaults and the values that a function closes over, those without a value yet as their names."""
    found: list[Any] = [function.__defaults__, function.__kwdefaults__]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append(cell.cell_contents)
        except ValueError:
            found.append(name)
    return found


def _of_code(code: types.CodeType) -> tuple[Any, ...]:
    """Code without the file and the lines it comes from."""
    constants = [_of_code(c) if isinstance(c, types.CodeType) else _of_constant(c) for c in code.co_consts]
    return code.co_code.hex(), code.co_names, code.co_varnames, constants


def _of_constant(constant: Any) -> str:
    """A constant; `repr` of a set depends on the process."""
    return repr(sorted(constant, key=repr)) if isinstance(constant, frozenset) else repr(constant)


def _of_reduced(value: Any, name: str, above: tuple[int, ...]) -> Any:
    """Any other object, by what pickle would write of it: how it is made, its state, its items."""
    try:
        registered = copyreg.dispatch_table.get(type(value))
        reduced = registered(value) if registered else value.__reduce_ex__(PICKLE_PROTOCOL)
    except Exception as error:  # each type refuses in its own way
        raise NoFingerprint(f"{name} ({_type_name(value)}) cannot be pickled: {error}") from error
    if isinstance(reduced, str):  # the name of a global, such as torch.float32
        return {"global": f"{_type_name(value)} {reduced}"}
    parts = [list(part) if i > 2 and part is not None else part for i, part in enumerate(reduced[:5])]
    return {"made": _of_value(parts, name, above)}


def _installed(module: str | None) -> bool:
    """Whether a module comes with Python or an installed package, and not from the user's own files."""
    if module in (None, "builtins") or module in sys.builtin_module_names:
        return True
    if module == "__main__":
        return False
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    if file is None:
        return str(module).partition(".")[0] in sys.stdlib_module_names
    return any(Path(file).is_relative_to(folder) for folder in _package_folders()) or _is_ours(str(module))


@functools.cache
def _package_folders() -> tuple[str, ...]:
    return tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # where it is not imported, nothing is a tensor
    return torch is not None and isinstance(value, torch.Tensor)


def _bytes_type() -> Any:
    return sys.modules["torch"].uint8


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _digest(data: Any) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]
