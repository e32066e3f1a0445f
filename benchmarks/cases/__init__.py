"""One module a case; ``python -m benchmarks.cases.NAME --help``."""
