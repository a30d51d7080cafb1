"""A criterion as a user would write it."""


def largest_first(weight):
    return -weight.abs()
