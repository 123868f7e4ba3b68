"""Fewer image tokens for the language model behind a vision tower."""

from tokenprune.pruning.language.pruners import Pruner, pruner_names, pruner_of, register_pruner
from tokenprune.pruning.language.pruning import LanguagePruning, LanguageTrace

__all__ = ["LanguagePruning", "LanguageTrace", "Pruner", "pruner_names", "pruner_of", "register_pruner"]
