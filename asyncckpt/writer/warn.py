"""What a save that succeeded is to be warned of, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from asyncckpt.format.paths import unescape_component

__all__ = ["save_warnings"]


def save_warnings(non_finite: Collection[str], earlier_step: int | None) -> Iterator[str]:
    """One sentence for each warning.

    Args:
        non_finite: keys of the arrays that hold NaN or infinity.
        earlier_step: the step before, if nothing that is trained has changed since.
    """
    if non_finite:
        first, *others = sorted(non_finite)
        more = f" and {len(others)} other tensor{'s' * (len(others) > 1)}" if others else ""
        yield f"{_readable(first)}{more} hold{'s' * (not others)} NaN or infinity"
    if earlier_step is not None:
        yield (
            f"no tensor that requires gradients has changed since step {earlier_step}; "
            "is the model that is trained the one that is saved?"
        )


def _readable(key: str) -> str:
    # What cannot be printed (lone surrogates could not even be sent) stays escaped.
    texts = [(part, unescape_component(part)) for part in key.removeprefix("state/").split("/")]
    return "/".join(text if text and text.isprintable() else part for part, text in texts)
