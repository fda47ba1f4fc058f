"""Hostile inputs for every reader."""
