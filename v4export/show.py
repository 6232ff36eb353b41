"""Results as text, for people."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from v4export.config import Engram, ModelConfig, Reasoning
from v4export.config.readers import table_rows
from v4export.engine.targets import support_rows
from v4export.evaluate.results import Evaluation
from v4export.evaluate.results import rows as evaluation_rows
from v4export.evaluate.results import summary as evaluation_summary

if TYPE_CHECKING:  # at run time these rooms are heavy, and nothing here needs more than their results
    from v4export.api import Built, Inspection, Repeated
    from v4export.calibrate.calibration import Calibration
    from v4export.engine.build import EngineReport
    from v4export.engine.doctor import Finding
    from v4export.runtime.generate import Generation


def built(result: Built, seconds: float, command: str) -> str:
    """What a build or an export left."""
    g, folder = result.graphs, result.bundle.folder
    lines = [
        result.audit,
        f"{folder / 'model.onnx'}: {g.nodes} nodes, {mib(g.pointed_bytes)} of weights used where they lie, "
        f"{mib(g.written_bytes)} written",
    ]
    if g.cpu_bytes:
        lines.append(f"{folder / 'model.cpu.onnx'}: {mib(g.cpu_bytes)} written once more, for a CPU's kernels")
    if g.beside_bytes:
        lines.append(f"{folder / 'engram.json'}: {mib(g.beside_bytes)} of tables read where they lie")
    lines += result.notes
    lines += [engine(one) for one in result.engines.values()]
    if result.verification:
        lines += [f"report: {folder / 'report.html'}", verdict(result.verification.summary(), seconds, command)]
    else:
        lines.append(verdict("NOT VERIFIED", seconds, command))
    return "\n".join(lines)


def repeated(result: Repeated, seconds: float, command: str) -> str:
    """What a build that was repeated left, and how far it is the same."""
    lines = [f"{name} was {then}, and is {now}" for name, (then, now) in result.versions.items()]
    lines.append(f"{result.built.bundle.folder}: {len(result.same)} files are byte-identical")
    lines += [f"cannot be identical: {', '.join(result.varying)}"]
    lines += [f"DIFFERS: {name}" for name in result.differing]
    return "\n".join([*lines, verdict("DIFFERENT" if result.differing else "IDENTICAL", seconds, command)])


def calibration(found: Calibration, file: object) -> str:
    """What a calibration came to: a row for every linear layer, two for the experts of a layer."""
    rows = []
    for one in found.found.values():
        scales, borrowed = one.values.reshape(-1), ", ".join(map(str, one.borrowed))
        module = one.name.removesuffix(".input_scale").removesuffix("_scale").removeprefix("model.")
        of_layer = module.startswith("layers.")
        layer, _, path = module.removeprefix("layers.").partition(".") if of_layer else ("", "", module)
        spans = _span(one.ranges, ".4g"), _span(scales.tolist(), ".3e"), _span(one.tokens, ",d")
        rows.append((layer, path, *spans, borrowed))
    head = ("layer", "reads", "range", "scale", "tokens", "experts that borrowed")
    few = sum(len(one.borrowed) for one in found.found.values())
    made = f"{file}: {len(rows)} scales by {found.scales.made['method']} over {found.tokens:,} tokens"
    return f"{_table(head, rows)}\n\n{made}, {few} of experts borrowed"


def calibration_json(found: Calibration) -> dict[str, Any]:
    """The same for programs."""
    return {
        "made": found.scales.made,
        "checkpoint": found.scales.checkpoint,
        "scales": {
            name: {"range": one.ranges, "scale": one.values.tolist(), "tokens": one.tokens, "borrowed": one.borrowed}
            for name, one in found.found.items()
        },
    }


def _span(values: Sequence[Any], form: str) -> str:
    """One number, or the least and the largest of several."""
    least, largest = (f"{pick(values):{form}}" for pick in (min, max))
    return least if least == largest else f"{least} .. {largest}"


def engine(report: EngineReport) -> str:
    """What TensorRT built."""
    proofs = "".join(f"\n  ✓ {claim}: {evidence}" for claim, evidence in report.proofs)
    return (
        f"{report.path}: {mib(report.bytes)}, {report.backend} {report.backend_version} for "
        f"{', '.join(report.targets)}; built, not run{proofs}"
    )


def verdict(summary: str, seconds: float, command: str) -> str:
    """The last line, which scripts look for."""
    return f"{summary} | {seconds:.0f} s | {command}"


def timings(generation: Generation) -> str:
    """Speed of a generation."""
    t, accepted, drafted = generation.timings, generation.accepted, generation.drafted
    drafts = f", {accepted} of {drafted} drafts accepted ({accepted / drafted:.0%})" if drafted else ""
    held = f" ({generation.cached_tokens} from the prompt cache)" if generation.cached_tokens else ""
    return (
        f"[{generation.prompt_tokens} prompt tokens{held}, {t.prefill_tokens_per_s:.0f}/s; "
        f"{len(generation.tokens)} new, {t.decode_tokens_per_s:.1f}/s{drafts}; {generation.finish_reason}]"
    )


def pauses(generation: Generation) -> str:
    """Where it paused to think, and what it thought, a line each."""
    count, total = len(generation.pauses), len(generation.tokens)
    rows = [(str(p.token), repr(p.before), f"{p.weight:+.3f}", repr(p.text)) for p in generation.pauses]
    head = f"paused before {count} of {total} tokens"
    return f"{head}\n{_table(('token', 'text', 'weight', 'thought'), rows)}" if rows else head


def inspection_json(found: Inspection) -> dict[str, Any]:
    """An inspection for programs."""
    c, p = found.config, found.parameters
    return {
        "family": c.family,
        "parameters": {
            "total": p.total,
            "active": p.active,
            "active_remembering": p.active_remembering,
            "by_part": dict(p.by_part),
        },
        "state_bytes_per_token": found.state_bytes_per_token,
        "state_bytes_fixed": found.state_bytes_fixed,
        "dtypes": found.dtypes,
        "layers": {"total": c.num_layers, **_layer_counts(c)},
        "reasoning": {"layers": c.reasoning.layers, "steps": c.reasoning.steps} if c.reasoning else None,
        "stored_bytes": found.stored_bytes,
        "audit": found.audit,
    }


def inspection(found: Inspection) -> str:
    """An inspection for people."""
    c, p = found.config, found.parameters
    rows = {
        "family": c.family,
        "layers": f"{c.num_layers}: " + ", ".join(f"{count} {kind}" for kind, count in _layer_counts(c).items()),
        "parameters": f"{p.total:,}, of which {p.active:,} active for a token",
        **{f"  {part.replace('_', ' ')}": f"{count:,}" for part, count in p.by_part.items()},
        "experts": f"{c.num_experts}, {c.experts_per_token} for a token, {c.num_shared_experts} shared",
        "routing": f"{c.scoring}, {c.topk_method}, {c.num_groups} groups"
        + (f"; in {len(c.hash_layers)} layers a table by token id" if c.hash_layers else ""),
        "attention": _attention(c),
        **({"residual": f"{c.hyper.streams} streams with hyper-connections"} if c.hyper else {}),
        **({"engram": _engram(c.engram)} if c.engram else {}),
        **({"reasoning": _reasoning(c.reasoning, p.by_part)} if c.reasoning and c.thinks else {}),
        **({"decoder": _decoder(c, p.active_remembering)} if p.active_remembering else {}),
        "state": f"{found.state_bytes_per_token:,} bytes per token in 16 bits"
        + (f", and {mib(found.state_bytes_fixed)} whatever the length" if found.state_bytes_fixed else ""),
        "stored": f"{mib(found.stored_bytes)}: " + ", ".join(f"{n} {d}" for d, n in found.dtypes.items())
        if found.dtypes
        else "a preset has no weights",
    }
    if found.audit:
        rows["audit"] = found.audit
    width = max(map(len, rows))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
    header, *body = support_rows()
    return f"{text}\n\nengines can be built for\n{_table(header, body)}"


def _layer_counts(config: ModelConfig) -> dict[str, int]:
    return dict(Counter(map(config.kind, range(config.num_layers))))


def _attention(c: ModelConfig) -> str:
    selected = f", {c.indexer.top_k} selected by {c.indexer.num_heads} index heads" if c.indexer else ""
    if c.compressed is None:
        return f"{c.num_heads} heads over a latent of {c.kv_lora_rank} + {c.qk_rope_head_dim} rotary{selected}"
    v = c.compressed
    ratios = " and ".join(map(str, sorted({*v.ratios} - {0})))
    return (
        f"{c.num_heads} heads of {v.head_dim} over a window of {v.window}"
        + (f" and entries of {ratios} tokens" if ratios else "")
        + selected
    )


def _engram(e: Engram) -> str:
    rows = " and ".join(f"{rows:,}" for rows in table_rows(e))
    return (
        f"layers {', '.join(map(str, e.layers))}: {e.heads} hashes of each n-gram of 2 to {e.max_order} tokens, "
        f"tables of {rows} rows of {e.width}" + (f", convolution of {e.kernel} taps" if e.kernel else "")
    )


def _reasoning(r: Reasoning, by_part: Mapping[str, int]) -> str:
    layers = "1 layer" if r.layers == 1 else f"{r.layers} layers"
    each, once = (f"{by_part[part]:,}" for part in ("reasoning_layers", "reasoning_head"))
    return f"{layers}, thoughts of {r.steps} steps: {each} parameters for each step, {once} once"


def _decoder(c: ModelConfig, active: int) -> str:
    first = next(filter(c.is_decoder, range(c.num_layers)))
    return f"from layer {first} on; {active:,} parameters active for a token of a prompt that skips it"


def evaluation(found: Evaluation) -> str:
    """What recipes cost in quality."""
    return "\n".join([table(evaluation_rows(found)), "", evaluation_summary(found), *found.notes])


def preset_table(found: Mapping[str, Inspection]) -> str:
    """All presets, a line each."""
    rows = [
        (name, f"{one.parameters.total / 1e9:,.3f}", f"{one.parameters.active / 1e9:,.3f}", f"{one.config.num_layers}",
         f"{one.config.num_experts}", f"{one.state_bytes_per_token:,}")
        for name, one in found.items()
    ]  # fmt: skip
    return _table(("preset", "parameters, 1e9", "active, 1e9", "layers", "experts", "state, bytes/token"), rows)


def findings(found: Sequence[Finding]) -> str:
    """What ``doctor`` saw."""
    marks = {"ok": "✓", "limited": "~", "missing": "✗"}
    rows = [(marks[f.state], f.component, f.version or "", f.does + (f"\n{f.fix}" if f.fix else "")) for f in found]
    return _table(("", "component", "version", "what it will do here"), rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header."""
    return _table(rows[0], rows[1:])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(box=None, pad_edge=False)
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=120, highlight=False, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
