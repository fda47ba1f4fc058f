"""Key sets of public configs of other trainers, with values of our own."""
