"""Markdown of what was measured on a GPU. Whatever is missing in a result is said to be, and is no error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Rows = Iterable[Sequence[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def paragraphs(*parts: str) -> str:
    """Those that are not empty, with lines between them."""
    return "\n\n".join(part for part in parts if part)


def machine(found: dict[str, Any]) -> str:
    """One line."""
    return ", ".join(f"{name} {value}" for name, value in found.items() if value not in (None, ""))


def attention(result: dict[str, Any]) -> str:
    """Tables of `bench attention` on a GPU: time of forward and backward, memory and errors, and what is not there."""
    rates = result.get("rates") or {}
    parts = [
        machine(result.get("machine", {})),
        f"Measured here: copies move {rates.get('bytes', 0) / 1e12:.2f} TB/s, {rates.get('exps', 0) / 1e12:.2f}e12 "
        f"exponentials/s, {rates.get('flops', 0) / 1e12:.0f} TFLOP/s in 16-bit products.",
    ]
    layers = result.get("layers", {})
    for what in ("forward", "backward"):
        head = (what, "way", "ms replayed (p10 .. p90)", "ms as called", "of the floor", "official takes", "best takes")
        parts.append(table(head, (row for name, layer in layers.items() for row in _time_rows(name, layer, what))))
    columns = ("memory and errors", "way", "kept, MB", "peaks, MB", "error of out", "of qkv", "of table", "of scale")
    parts.append(table(columns, (row for name, layer in layers.items() for row in _other_rows(name, layer))))
    return paragraphs(*parts, *_absent(result))


def median(record: dict[str, Any], what: str) -> float | None:
    """Seconds of a way: of the GPU alone where its graph could be replayed, else as called."""
    seconds = record.get("seconds", {})
    found = seconds.get(f"{what}, replayed") or seconds.get(what)
    return found["median"] if found else None


def best_of_others(layer: dict[str, Any], what: str, ours: Iterable[str]) -> tuple[str, float] | None:
    """The fastest exact way that is not ours, and its seconds."""
    taken = {name: median(record, what) for name, record in layer["ways"].items() if name not in ours}
    exact = {name: s for name, s in taken.items() if s is not None and layer["ways"][name].get("exact", True)}
    return min(exact.items(), key=lambda item: item[1]) if exact else None


def _time_rows(name: str, layer: dict[str, Any], what: str) -> Rows:
    from fdscale.kernels.attention import NAMES

    best = best_of_others(layer, what, NAMES)
    for way, record in layer["ways"].items():
        if what == "backward" and not record.get("trains", True):
            continue
        taken = median(record, what)
        if taken is None:
            yield (name, way, f"failed: {record.get('failed', 'not measured')}", *[""] * 4)
            continue
        seconds, official = record["seconds"], median(layer["ways"].get("official", {}), what)
        yield (
            name,
            way,
            _spread(seconds[f"{what}, replayed"]) if f"{what}, replayed" in seconds else "",
            _spread(seconds[what]),
            _share(layer.get("floors", {}).get(what), taken),
            f"{official / taken:.2f} x" if official else "",
            f"{best[1] / taken:.2f} x ({best[0]})" if best and way in NAMES else "",
        )


def _share(floor: dict[str, Any] | None, taken: float) -> str:
    return f"{floor['seconds'] / taken:.0%} ({floor['binds']})" if floor else ""


def _spread(seconds: dict[str, float]) -> str:
    return f"{1e3 * seconds['median']:.3f} ({1e3 * seconds['p10']:.3f} .. {1e3 * seconds['p90']:.3f})"


def _other_rows(name: str, layer: dict[str, Any]) -> Rows:
    for way, record in layer["ways"].items():
        kept = f"{record['kept_bytes'] / 1e6:.1f}" if "kept_bytes" in record else ""
        peaks = [f"{record[key] / 1e6:.1f}" for key in ("forward_peak_bytes", "backward_peak_bytes") if key in record]
        errors = record.get("errors", {})
        cells = [f"{errors[key]:.1e}" if key in errors else "" for key in ("out", "qkv", "table", "scale")]
        yield (name, way, kept, ", ".join(peaks), *cells)


def _absent(result: dict[str, Any]) -> list[str]:
    """What was not measured, what failed and what a reader must know of a way: one line for each kind."""
    said: dict[str, list[str]] = {}
    for name, layer in result.get("layers", {}).items():
        for way, why in layer.get("left_out", {}).items():
            said.setdefault(f"{way} left out: {why}", []).append(name)
        for way, record in layer["ways"].items():
            for key, words in (("failed", "failed"), ("not_replayed", "not replayed"), ("note", "note")):
                if record.get(key):
                    said.setdefault(f"{way}, {words}: {record[key]}", []).append(name)
        if "no_errors" in layer:
            said.setdefault(f"errors not measured: {layer['no_errors']}", []).append(name)
    every = len(result.get("layers", {}))
    lines = [f"- {line}{'' if len(on) == every else f' ({join(on)})'}" for line, on in said.items()]
    if result.get("not_measured"):
        lines.append(f"- not measured, for lack of time: {join(result['not_measured'])}")
    if now := result.get("now"):
        lines.append(f"- ended while {now['way']} ran on {now['layer']}")
    return ["\n".join(lines)] if lines else []


def join(names: Iterable[str]) -> str:
    """Names in one line."""
    return "; ".join(names)
