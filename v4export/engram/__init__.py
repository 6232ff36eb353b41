"""Engram memory on the host: token ids to rows of tables that are too large for a graph, which takes them as an input.

vocabulary (token ids to compressed ids) · hashing (tokens to row numbers; ``config/hashes.py`` has the multipliers and
primes) · storage and table (row numbers to numbers) · feed (all of it, also a step ahead) · files (its form in a
bundle) · engram.hpp (the same for programs in C++). Source: arXiv 2601.07372.

Letters as in ``v4export/model/__init__.py``, and N: tokens of the longest n-gram; a history holds N-1.
"""
