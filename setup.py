"""For installers that start setup.py itself; pyproject.toml has everything."""

from setuptools import setup

setup()
