"""Turn settings into plain JSON types and back, for constraints and updates."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from projgd.values import Values


@dataclass(frozen=True)
class Configured:
    """Describe a frozen dataclass that `from_config` can make again from its `config`.

    Attributes:
        kinds: every subclass by its name.
    """

    kinds: ClassVar[dict[str, type[Configured]]] = {}

    def __init_subclass__(cls) -> None:
        Configured.kinds[cls.__name__] = cls

    def config(self) -> dict[str, Any]:
        """Return the settings in plain JSON types; `projgd.from_config` makes the object again.

        Returns:
            A dict with the class's name under `"kind"`, and one entry per hyperparameter.

        >>> from projgd import MaxNorm
        >>> MaxNorm(3.0).config()
        {'kind': 'MaxNorm', 'c': 3.0, 'axis': 'fan_in'}
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"kind": type(self).__name__} | {k: _plain(v) for k, v in fields.items()}


def from_config(config: dict[str, Any]) -> Any:
    """Return the constraint or the update that `config` describes.

    Args:
        config: what `config()` returned, perhaps after a round trip through JSON.

    Returns:
        An object that equals the one whose `config()` was called.

    Raises:
        TypeError: a hyperparameter that the class does not have, or one of a wrong type.
        ValueError: an unknown kind, or a hyperparameter out of range.

    >>> from_config({"kind": "MaxNorm", "c": 3.0, "axis": [0, 1]})
    MaxNorm(c=3.0, axis=(0, 1))
    """
    fields = dict(config)
    kind = fields.pop("kind", None)
    known = {name: cls for name, cls in Configured.kinds.items() if not inspect.isabstract(cls)}
    if kind not in known:
        raise ValueError(f"config names the kind {kind!r}; known are {', '.join(sorted(known))}")
    return known[kind](**{k: _read(v) for k, v in fields.items()})


def _read(value: Any) -> Any:
    """Return a value in which every config is the object that it describes."""
    if isinstance(value, dict) and "kind" in value:
        return from_config(value)
    return [_read(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


def _plain(value: Any) -> Any:
    """Return a value as a plain JSON type."""
    if isinstance(value, Configured):
        return value.config()
    if isinstance(value, Values):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
