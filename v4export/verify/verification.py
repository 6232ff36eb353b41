"""Verifies a bundle: runs its graph, compares it with the PyTorch definition, and gives a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import psutil

from v4export.checkpoint.activation_scales import FILE as SCALES
from v4export.checkpoint.activation_scales import check_checkpoint, read_scales, wanted_scales
from v4export.checkpoint.audit import Weight, in_graph
from v4export.config import ModelConfig
from v4export.errors import NumbersDiffer
from v4export.graphs.export import for_cpu, graphs_in
from v4export.graphs.ranks import Plan, pieces
from v4export.graphs.roundings import rounding_faults
from v4export.package.bundle import Bundle, versions
from v4export.runtime.onnx import OnnxExecutor
from v4export.verify.bodies import body_faults
from v4export.verify.boundary import Boundary
from v4export.verify.compare import compare
from v4export.verify.drafts import compare_drafts
from v4export.verify.looked_up import engram_faults
from v4export.verify.norms import norm_faults
from v4export.verify.prompts import LENGTHS, default_prompts
from v4export.verify.recording import Recording, draft_tap_names, record, tap_names
from v4export.verify.references import check_references
from v4export.verify.remembering import remembered_rows

#: Tokens of a prefill chunk while verifying: small, so that prompts take several; and odd, so that chunks begin at
#: every place within a compressed entry.
CHUNK = 37

#: The same for the portable bodies, which gather the matrices of every token's experts at once.
BODIES_CHUNK = 3


@dataclass(frozen=True)
class Verification:
    """The outcome.

    Attributes:
        device: that ran the graph.
        prompts: lengths of the prompts; each ran alone, and all but the last as one batch.
        decoded: tokens decoded after each.
        boundaries: every figure.
        bodies: whether the portable bodies ran, too; on a CPU a faster copy of the graph is what runs otherwise.
    """

    device: str
    prompts: tuple[int, ...]
    decoded: int
    boundaries: tuple[Boundary, ...]
    bodies: bool = True

    @property
    def passed(self) -> bool:
        """Whether every boundary is within its limit."""
        return all(b.ok for b in self.boundaries)

    @property
    def ties(self) -> int:
        """Tokens whose experts or selection differ within a near tie, over all layers."""
        return sum(b.ties for b in self.boundaries)

    @property
    def layers(self) -> int:
        """How many layers were compared."""
        return len({b.name.split()[1] for b in self.boundaries if b.name.startswith("layer ")})

    def summary(self) -> str:
        """The line that scripts look for, without time and command."""
        verdict = "PASSED" if self.passed else "FAILED"
        return f"{verdict} | {self.layers} layers, {len(self.prompts)} prompts, {self.ties} near-ties"

    def check(self) -> None:
        """Raise where the verdict is a failure.

        Raises:
            NumbersDiffer: names the first boundary beyond its limit.
        """
        bad = [b for b in self.boundaries if not b.ok]
        if bad:
            first = bad[0]
            error = NumbersDiffer(
                f"the graph and the PyTorch definition part at {first.name}",
                f"relative difference {first.rel:.2e}, limit {first.limit:.2e}; " + "; ".join(first.notes[:3]),
                f"{len(bad)} of {len(self.boundaries)} boundaries differ; the lines marked with a cross say how",
            )
            error.summary = self.summary()
            raise error


def verify_bundle(
    bundle: Bundle,
    weights: dict[str, Weight],
    *,
    device: str = "cpu",
    kernels: bool = False,
    token_map: np.ndarray | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    decode: int = 32,
    advance: Callable[[Boundary], None] = lambda _: None,
) -> Verification:
    """Run the bundle's graph on ``device`` and compare it at every layer boundary.

    Args:
        bundle: with a graph.
        weights: of the audited checkpoint it was made from.
        device: ``cpu`` or ``cuda``.
        kernels: run this project's kernels for a CPU as well, over the same prompts.
        token_map: token id -> compressed id of the checkpoint's tokenizer, for a model with Engram.
        prompts: tokens; text of several lengths unless given.
        decode: tokens to decode after each prompt.
        advance: told every boundary as it is compared.
    """
    config = bundle.config
    decode = min(decode, bundle.max_seq_len // 2)
    prompts = prompts or default_prompts(bundle.folder, config, bundle.max_seq_len - decode)
    scales = _scales(bundle)
    references = _references(bundle, weights, token_map, scales)
    advance(references)
    batches = [[prompt] for prompt in prompts] + [list(prompts[:-1])] * (len(prompts) > 2)
    recordings, rows = [], []
    for by_kernels in (False, True)[: 1 + kernels]:
        executor = _executor(bundle, device, kernels=by_kernels)
        recordings += [r for batch in batches for r in record(executor, config, batch, chunk=CHUNK, decode=decode)]
        recordings += _past_the_decoder(executor, config, prompts, CHUNK, decode)
        rows += _remembered(executor, bundle, prompts, CHUNK)
    bodies = device != "cpu" or (bodies_fit(bundle) and bundle.sharding is None)
    if device == "cpu" and bodies:
        executor = _executor(bundle, device, bodies=True)
        for batch in _for_bodies(config, prompts):
            recordings += record(executor, config, batch, chunk=BODIES_CHUNK, decode=min(decode, 2))
        few = [max(prompts, key=len)[:12]]
        recordings += _past_the_decoder(executor, config, few, BODIES_CHUNK, min(decode, 2))
        rows += _remembered(executor, bundle, few, BODIES_CHUNK)
    # Of all forms of the graph, what is wrong.
    rows = sorted(rows, key=lambda one: one.ok)[:1]
    for one in rows:
        advance(one)
    boundaries = compare(weights, config, bundle.precision, recordings, advance, token_map, scales)
    drafts = compare_drafts(weights, config, bundle.precision, recordings, advance)
    return Verification(device, tuple(map(len, prompts)), decode, (references, *rows, *boundaries, *drafts), bodies)


def _past_the_decoder(
    executor: OnnxExecutor, config: ModelConfig, prompts: Sequence[Sequence[int]], chunk: int, decode: int
) -> list[Recording]:
    """The longest prompt once more, half of which is only remembered, of a model with a decoder."""
    longest = max(prompts, key=len)
    if executor.tail is None or len(longest) < 2:
        return []
    return record(executor, config, [longest], chunk=chunk, decode=decode, remembered=len(longest) // 2)


def _remembered(executor: OnnxExecutor, bundle: Bundle, prompts: Sequence[Sequence[int]], chunk: int) -> list[Boundary]:
    """Rows that are left without passing the decoder, of a model with one."""
    longest = max(prompts, key=len)
    if executor.tail is None or len(longest) < 2:
        return []
    return [remembered_rows(executor, bundle.config, bundle.precision, longest[: len(longest) // 2], chunk)]


def _for_bodies(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """What the portable bodies run: all beginnings as a batch; and the longest prompt alone to its first long entry."""
    batches = [[prompt[: 3 * BODIES_CHUNK] for prompt in prompts]]
    if config.compressed:
        reach = max([config.compressed.window, *config.compressed.ratios]) + 2 * BODIES_CHUNK
        batches.append([max(prompts, key=len)[:reach]])
    return batches


def bodies_fit(bundle: Bundle) -> bool:
    """Whether the stacks of experts that the portable bodies make fit into half of the free memory."""
    c = bundle.config
    stacks = len(c.moe_layers) * c.num_experts
    gathered = (len(LENGTHS) + bool(c.compressed)) * BODIES_CHUNK * c.experts_per_token
    # onnxruntime folds the stacks, in float32, while their parts are still there.
    return (2 * stacks + gathered) * c.expert_parameters * 4 < psutil.virtual_memory().available // 2


def _executor(bundle: Bundle, device: str, bodies: bool = False, kernels: bool = False) -> OnnxExecutor:
    return OnnxExecutor(
        bundle.folder,
        bundle.config,
        bundle.precision,
        max_seq_len=bundle.max_seq_len,
        device=device,
        taps=tap_names(bundle.config),
        prepack=False,
        bodies=bodies,
        kernels=kernels,
        thought_taps=True,
        draft_taps=draft_tap_names(bundle.config),
        sharding=bundle.sharding,
    )


def _scales(bundle: Bundle) -> dict[str, np.ndarray]:
    """The scales by which inputs are rounded: those that came into the bundle, never the graph's own."""
    if not bundle.precision.inputs:
        return {}
    file = bundle.folder / SCALES
    stored = read_scales(file, bundle.config)
    check_checkpoint(stored, file, bundle.manifest["checkpoint"]["header_sha256"])
    return wanted_scales(stored.values, bundle.config, bundle.precision)


def _references(
    bundle: Bundle, weights: dict[str, Weight], token_map: np.ndarray | None, scales: dict[str, np.ndarray]
) -> Boundary:
    """The check of every weight reference, as the first line of the report."""
    engram, inside = bundle.config.engram, in_graph(weights, bundle.config)
    each, names = [list(inside.values())], graphs_in(bundle.folder)
    if bundle.sharding:
        each = pieces(each[0], Plan.read(bundle.manifest["sharing"]))[1]
    graphs = {file: each[i % len(each)] for i, name in enumerate(names) for file in (name, for_cpu(name))}
    found = check_references(bundle.folder, graphs, inside, bundle.precision, scales)
    wrong = found.wrong
    for name in graphs_in(bundle.folder) if bundle.precision.inputs else ():
        both = (ir.load(bundle.folder / file) for file in (name, for_cpu(name)))
        wrong += tuple(f"{name}: {fault}" for fault in rounding_faults(*both, bundle.config, bundle.precision))
    for name in names:
        wrong += tuple(f"{name}: {fault}" for fault in norm_faults(ir.load(bundle.folder / name), bundle.config))
    if _same_writer(bundle):
        wrong += tuple(f"{name}: {fault}" for name in names for fault in body_faults(ir.load(bundle.folder / name)))
    if engram and token_map is not None:
        wrong += engram_faults(bundle.folder, engram, weights, token_map)
    derivation = f"exact: {found.count} references to weights compared with the checkpoint, "
    derivation += f"{found.converted} converted again"
    return Boundary("weights", not wrong, 0.0, 0.0, 0.0, 1.0, derivation, notes=wrong[:5])


def _same_writer(bundle: Bundle) -> bool:
    """Whether the bundle's bodies were written by what is installed; another version may word the same otherwise."""
    then, now = bundle.manifest.get("versions"), versions()
    return then is None or all(then.get(name) == now.get(name) for name in ("v4export", "onnx-ir"))
