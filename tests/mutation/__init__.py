"""Mutation testing of the numerical core: ``python -m tests.mutation``."""
