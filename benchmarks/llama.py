"""llama.cpp over a GGUF file, by the C API as llama-cpp-python has it: the fourth of the engines that are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from engines import THREADS
from subject import MAX_SEQ_LEN

#: Prompt tokens of a step, as llama.cpp's own default is.
CHUNK = 512


class Llama:
    """llama.cpp, with its defaults but for threads and the layout of weights: cached rows in float16, flash attention
    where it has some.

    Args:
        model: a GGUF file.
        states: folder in which states of so many tokens are kept, since reading a long prompt takes minutes and what
            cached rows hold does not change what a step costs. Files of other weights of the same shapes serve, too.
        max_seq_len: tokens there is room for.
        exact: keep cached rows in float32 and compute attention without the fused operator.
    """

    def __init__(
        self, model: Path, states: Path | None = None, max_seq_len: int = MAX_SEQ_LEN, exact: bool = False
    ) -> None:
        import llama_cpp

        self._api, self._states = llama_cpp, states
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        given = llama_cpp.llama_model_default_params()
        # Weights laid out anew, which is the default, end the process in an assertion on a CPU with AMX.
        given.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), given)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch = -(-max_seq_len // 256) * 256, CHUNK, CHUNK
        how.n_threads = how.n_threads_batch = THREADS
        if exact:
            how.type_k = how.type_v = llama_cpp.GGML_TYPE_F32
            how.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, how)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {model}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def hold(self, tokens: int) -> None:
        """A state of so many random tokens."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        if not tokens:
            return
        file = self._states / f"{tokens}.state" if self._states else None
        if file and file.exists():
            held, count = (api.llama_token * tokens)(), (api.ctypes.c_size_t * 1)()
            if api.llama_state_seq_load_file(self._context, str(file).encode(), 0, held, tokens, count):
                return
            raise RuntimeError(f"llama.cpp does not take {file}")
        ids = np.random.default_rng(0).integers(0, self.vocabulary, tokens)
        self.read(ids)
        if file:
            own = (api.llama_token * tokens)(*ids.tolist())
            api.llama_state_seq_save_file(self._context, str(file).encode(), 0, own, tokens)

    def step(self, tokens: int) -> None:
        self.read(np.random.default_rng(tokens).integers(0, self.vocabulary, tokens))

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Run tokens behind those that are held; logits [V] after the last one."""
        api = self._api
        for at in range(0, len(ids), CHUNK):
            part = ids[at : at + CHUNK].tolist()
            array = (api.llama_token * len(part))(*part)
            if api.llama_decode(self._context, api.llama_batch_get_one(array, len(part))):
                raise RuntimeError(f"llama.cpp does not run {len(part)} tokens")
        logits = api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,))
