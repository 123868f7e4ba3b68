"""Saving sparsified models in folders and Hub repositories, and getting them back; never with pickle."""

from tokenprune.saving import runtimes  # noqa: F401 (registers those which run files)
from tokenprune.saving.hub import push_to_hub
from tokenprune.saving.load import from_pretrained
from tokenprune.saving.save import save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
