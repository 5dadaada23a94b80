"""A bounded memory of recently used values: open files, lookup tables."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Recent:
    """The most recently used values, as many as fit in `limit`.

    `weigh(value)` says how much of the limit a value takes (default: each takes 1); `drop(value)` is called on a
    value that falls out (default: nothing). The newest value always stays, even if it alone exceeds the limit. A
    pickled copy starts
    empty: open files mean nothing in another process. A forked copy may go on as it is.
    """

    def __init__(
        self, limit: int, weigh: Callable[[Any], int] | None = None, drop: Callable[[Any], None] | None = None
    ) -> None:
        self.limit, self.weight = limit, 0
        self._weigh, self._drop = weigh, drop
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """The value of `key`, from `make(key)` if it is not at hand."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make(key)
        self._values[key] = value
        self.weight += self._weigh(value) if self._weigh else 1
        while self.weight > self.limit and len(self._values) > 1:
            self._forget(self._values.popitem(last=False)[1])
        return value

    def drop_if(self, test: Callable[[Any, Any], bool]) -> None:
        """Let go of the values for which `test(key, value)` holds."""
        for key in [key for key, value in self._values.items() if test(key, value)]:
            self._forget(self._values.pop(key))

    def clear(self) -> None:
        """Let go of every value."""
        while self._values:
            self._forget(self._values.popitem()[1])

    def _forget(self, value: Any) -> None:
        self.weight -= self._weigh(value) if self._weigh else 1
        if self._drop:
            self._drop(value)

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple:
        return Recent, (self.limit, self._weigh, self._drop)

    def __del__(self) -> None:
        self.clear()
