"""Searches of ranks, parts and gates."""
