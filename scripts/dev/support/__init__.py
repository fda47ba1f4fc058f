"""The table of docs/support.md: what qlora does with each architecture of transformers that generates text."""
