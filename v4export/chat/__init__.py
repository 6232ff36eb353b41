"""Conversations to prompts, and what a model answers back to messages.

A checkpoint's own chat template is used where it has one. DeepSeek publishes the encodings of V3.2, V4 and V4.1 as
prose and Python, which is never run here: ``*.jinja`` are templates of the same.
"""

from v4export.chat.answer import Answer, ToolCall, read_answer
from v4export.chat.conversation import Conversation
from v4export.chat.streaming import AnswerStream
from v4export.chat.template import ChatTemplate

__all__ = ["Answer", "AnswerStream", "ChatTemplate", "Conversation", "ToolCall", "read_answer"]
