"""Slow, obvious versions in plain fp32 torch that the fast code is compared with."""
