"""Finds the first node at which two executions of a graph part, and writes the smallest case that shows it."""
