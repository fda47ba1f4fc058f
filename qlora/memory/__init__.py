"""Memory of a run: predicted, measured, and fitted to a device."""
