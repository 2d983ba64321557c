"""Exporters: the adapters to backbone families, the trace, and the compiler that makes step graphs of it."""
