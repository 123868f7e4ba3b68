"""Photographs and textures, to be told apart by crops of regions that were never seen."""
