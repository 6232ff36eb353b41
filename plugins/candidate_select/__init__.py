"""The candidate_select op."""
