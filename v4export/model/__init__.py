"""The one definition of the maths, in PyTorch: state in, new rows out, nothing hidden.

Legend of letters, used as suffixes of names here, as dimension names in the ONNX graph, and in the report:
B batch, S new tokens, T cached tokens, M = B*S tokens of a step, D hidden, X streams of hyper-connections, H heads,
N no-position width, R rotary width, L latent width, W width of a cached row, V value width (of logits: vocabulary),
C cached entries, U new entries, I width of an index key, E experts, K chosen experts or selected entries, F expert
width, G groups, Q positions whose logits are wanted, P earlier steps of a thought (of whose rows M = B*Q).
"""

from v4export.model.transformer import Transformer

__all__ = ["Transformer"]
