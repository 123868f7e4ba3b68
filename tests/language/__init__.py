"""Tests of language models behind vision towers."""
