"""The demo: handwritten digits hidden among fragments of other digits."""
