"""Text from a bundle, and bundles packaged for those who serve or embed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from v4export.chat import ChatTemplate, Conversation, read_answer
from v4export.config import ModelConfig
from v4export.cpp import verb as cpp_packaging
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import Bundle
from v4export.runtime.drafting import Drafting
from v4export.runtime.executors import ONNXRUNTIME, Choice
from v4export.runtime.generate import Generation, run_text
from v4export.runtime.pausing import Pausing
from v4export.runtime.prompt_cache import PromptCache, key_of
from v4export.runtime.sampling import Sampling
from v4export.runtime.tokenizer import load_tokenizer
from v4export.serve.limits import Limits
from v4export.serve.repository import Packaged, write_repository

_IMAGE = "it stands for an image, and text alone is exported"


def run(
    folder: str | Path,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    chat: bool = False,
    messages: Path | None = None,
    thinking: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    skip_decoder: bool = False,
    think: str | None = None,
    think_threshold: float | None = None,
    draft_max: int | None = None,
    threads: int = 0,
    accuracy_level: int = 0,
    device: str = "cpu",
    executor: str = ONNXRUNTIME,
    cuda_graphs: bool = True,
    kernels: bool = False,
    check_files: bool = True,
    prompt_cache: Path | None = None,
    prompt_cache_all: bool = False,
    prompt_cache_ro: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Generate text from a bundle; ``on_text`` is told text as it comes.

    What runs it is an ``executor`` of ``v4export.runtime.executors``: onnxruntime on a ``device``, or TensorRT, whose
    engines the bundle has, with or without ``cuda_graphs``. With ``kernels``, onnxruntime on a CPU runs this project's.

    With ``chat``, the prompt is a question, and with ``messages``, a JSON file of them, a conversation goes on: by the
    checkpoint's chat template, or its family's; ``thinking`` lets the model reason first. The result has an ``answer``.
    With ``skip_decoder``, all but the last tokens of a prompt pass only the layers before the decoder (V4.1). A model
    with reasoning layers pauses to ``think``: a number of steps before every token, ``auto`` where it is not sure
    (``think_threshold`` in place of the manifest's), or ``off``; ``auto`` unless given. One with a draft graph drafts
    ``draft_max`` tokens ahead of a step, 1 unless given, which changes nothing but speed. With an ``accuracy_level`` of
    4, matrices of integers are multiplied by activations in eight bits (``v4export.runtime.sessions.Running``). Without
    ``check_files``, the bundle's files are not compared with its manifest's hashes first. A ``prompt_cache`` is a file
    that the prompt's state is taken from, as far as it goes, and kept in afterwards, with ``all`` that was generated as
    well, or not at all (``ro``); see ``v4export.runtime.prompt_cache``.
    """
    if sum(one is not None for one in (prompt, prompt_file, messages)) != 1:
        raise BadInput("a prompt is needed, once", fix="give --prompt TEXT, --prompt-file FILE or --messages FILE")
    bundle = Bundle.open(Path(folder)).checked(check_files)
    talk = Conversation.read(messages) if messages else None
    if talk is None:
        text = prompt if prompt is not None else _text_of(Path(prompt_file or ""))
        talk = Conversation.asking(text) if chat else None
    if talk:
        text = talk.prompt(ChatTemplate.of(bundle.folder, bundle.config), thinking)
    cache = _prompt_cache(bundle, prompt_cache, prompt_cache_all, prompt_cache_ro, accuracy_level)
    if cache and skip_decoder:
        why = "where the decoder begins depends on how long the prompt is"
        raise NotSupported("a prompt that skips the decoder is kept in no prompt cache", why, "leave one of them out")
    if cache and draft_max:
        why = "it holds nothing of the layer that drafts"
        raise NotSupported("nothing is drafted behind a prompt cache", why, "leave --draft-max or --prompt-cache out")
    pausing = Pausing.read(think, bundle.thinking, think_threshold)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    tokenizer = load_tokenizer(bundle.folder)
    generation = run_text(
        Choice(executor, device, threads, accuracy_level, cuda_graphs, kernels).open(bundle),
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_strings=stop,
        stop_ids=frozenset(bundle.config.eos_token_ids),
        ignore_eos=ignore_eos,
        skip_decoder=skip_decoder,
        pausing=pausing,
        drafting=None if cache else Drafting.of(draft_max, bundle.config.drafts),
        refused_ids=_refused_ids(bundle.config),
        framed=talk is not None,
        prompt_cache=cache,
        on_text=on_text,
    )
    if talk is None:
        return generation
    said = tokenizer.decode(generation.tokens, skip_special_tokens=False)
    return replace(generation, answer=read_answer(said, talk.thinks(thinking)))


def _prompt_cache(
    bundle: Bundle, file: Path | None, everything: bool, read_only: bool, accuracy_level: int
) -> PromptCache | None:
    """The file that a prompt's state is kept in.

    Raises:
        BadInput: there is none, and it was said how to use it, or its folder does not exist.
        NotSupported: the model is shared among ranks.
    """
    if file is None:
        if everything or read_only:
            raise BadInput("no prompt cache is named", fix="give --prompt-cache FILE as well")
        return None
    if bundle.sharding:
        why = f"the model is shared among {bundle.sharding.ranks} ranks, each of which has its own part"
        raise NotSupported("the state of this bundle is kept in no prompt cache", why, "leave --prompt-cache out")
    key = key_of(bundle.manifest, accuracy_level=accuracy_level)
    return PromptCache(Path(file), key, everything, read_only)


def _text_of(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {file}", str(error), "give a text file in UTF-8") from error


def _refused_ids(config: ModelConfig) -> dict[int, str]:
    """Tokens that a prompt may not have, and why."""
    return {} if config.image_token_id is None else {config.image_token_id: _IMAGE}


def package_cpp(folder: str | Path, out: str | Path) -> cpp_packaging.CppPackage:
    """Write a CMake project that runs a bundle from C++, ids in and out; see ``v4export.cpp.verb.package``."""
    bundle = Bundle.open(Path(folder)).checked()
    return cpp_packaging.package(bundle, Path(out), _refused_ids(bundle.config))


def package(
    folder: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    executor: str = ONNXRUNTIME,
    cuda_graphs: bool = True,
    kernels: bool = False,
    check_files: bool = True,
    slots: int = Limits.slots,
    queue: int = Limits.queue,
    chunk: int = Limits.chunk,
    draft_max: int | None = None,
    max_tokens: int = 256,
    threads: int = 0,
) -> Packaged:
    """Write a model repository that a stock Triton Inference Server loads: text in, streamed text out.

    Args:
        folder: of the bundle.
        out: the repository, which must not exist.
        name: of the model; the bundle's folder's unless given.
        device: that onnxruntime runs on in the server.
        executor: a name of ``v4export.runtime.executors``.
        cuda_graphs: whether TensorRT's decode steps are replayed as CUDA graphs.
        kernels: whether onnxruntime on a CPU runs this project's own there.
        check_files: whether the server compares files with the manifest's hashes whenever it loads the model; they are
            compared here in any case.
        slots: sequences that get tokens at the same time.
        queue: requests that may wait for one.
        chunk: the most prompt tokens read between two tokens of others.
        draft_max: the most tokens drafted ahead of a step; 1 of a bundle with a draft graph, unless given.
        max_tokens: new tokens where a client names no number.
        threads: of onnxruntime; 0 lets it choose.

    Raises:
        BadInput: it is no bundle or has changed, it has no tokenizer, or ``out`` exists.
    """
    bundle = Bundle.open(Path(folder))
    drafting = Drafting.of(draft_max, bundle.config.drafts)
    return write_repository(
        bundle,
        Path(out),
        name=name,
        choice=Choice(executor, device, threads, cuda_graphs=cuda_graphs, kernels=kernels),
        limits=Limits(slots, queue, chunk, drafting.most if drafting else 0),
        check_files=check_files,
        max_tokens=max_tokens,
    )
