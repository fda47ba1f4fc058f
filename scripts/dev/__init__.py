"""Measurements, attacks and checks that are too long for the tests, which share their parts."""
