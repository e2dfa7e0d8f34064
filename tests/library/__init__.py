"""Tests of the library that other people's loops use."""
