"""Equivalence of backends, times, and the machine they were measured on."""
