"""Benchmarks: pytest-benchmark suites, probes, and the report made from recorded results."""
