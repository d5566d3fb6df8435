"""Reward functions: found by name, called with what they ask for, and never believed blindly."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# f(prompts, completions, **columns) -> one number for each completion, or None to skip it
RewardFunction = Callable[..., Sequence[float | None]]


class FunctionError(ValueError):
    """A reward function raised, or returned something that is no list of scores."""


def load_function(path: str, *, option: str) -> RewardFunction:
    """The function that "module:function" or "path.py:function" names.

    Raises ValueError, naming the option it was given to, if there is none.
    """
    source, _, name = path.rpartition(":")
    try:
        module = _load_file(source) if source.endswith(".py") else importlib.import_module(source)
        function = getattr(module, name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ValueError(
            f"{option} {path!r} is no function: give module:function or path.py:function "
            f"({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise ValueError(f"{option} {path!r} is no function but {type(function).__name__}")
    return function


def function_name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def call_function(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[float]:
    """One number for each completion, NaN where the function gave None.

    A function without **columns is given those columns that it names. Raises FunctionError with
    the function's name if it raises, or returns another count, NaN, infinity or no number.
    """
    name = function_name(function)
    try:
        values = function(prompts, completions, **_accepted(function, columns))
    except FunctionError:
        raise
    except (Exception, SystemExit) as error:
        raise FunctionError(
            f"reward function {name} raised {type(error).__name__}: {error}"
        ) from error
    try:
        values = list(values)
    except TypeError as error:
        raise FunctionError(
            f"reward function {name} returned {type(values).__name__}: return a list with a "
            "number, or None, for each completion"
        ) from error
    if len(values) != len(completions):
        raise FunctionError(
            f"reward function {name} returned {len(values)} values for {len(completions)} "
            "completions: return one for each, None to skip it"
        )
    return [_number(value, completions[i], name) for i, value in enumerate(values)]


def _load_file(source: str) -> Any:
    path = Path(source).expanduser()
    name = f"reward_file_{path.stem}"  # shadows no module of that name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _accepted(
    function: RewardFunction, columns: Mapping[str, Sequence[Any]]
) -> Mapping[str, Sequence[Any]]:
    """The columns to call it with. Raises FunctionError if it asks for others."""
    signature = inspect.signature(function)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    accepted = dict(columns)
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        accepted = {n: column for n, column in columns.items() if n in signature.parameters}
    try:
        signature.bind((), (), **accepted)
    except TypeError as error:
        raise FunctionError(
            f"reward function {function_name(function)}: {error}. It is called with prompts, "
            f"completions and the data's other columns by name: {', '.join(columns) or 'none'}"
        ) from error
    return accepted


def _number(value: Any, completion: Any, name: str) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise FunctionError(
            f"reward function {name} returned {value!r}: a number or None is expected"
        ) from error
    if not math.isfinite(number):
        raise FunctionError(
            f"reward function {name} returned {number} for {str(completion)[:80]!r}: return a "
            "finite number, or None to skip the completion"
        )
    return number
