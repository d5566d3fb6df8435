"""What `__post_init__` asks of numbers: a ValueError names the field and what it got."""

from __future__ import annotations


def positive(config: object, *names: str) -> None:
    """None, a field that was not given, passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


def fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
