"""The commands: arguments to a config, one call, a report on the screen."""
