"""Embedded models and test models, built from packages on PyPI."""
