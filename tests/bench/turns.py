"""Orders turns: each way leaves traces on the machine for the way that follows."""

from collections.abc import Sequence


def turns(names: Sequence[str], number: int) -> list[str]:
    """Returns the order of round `number`: over the rounds, each follows each other about as often.

    With an even number of names exactly as often (Williams, Experimental designs balanced for the
    estimation of residual effects of treatments, 1949); with an odd number every other cycle of
    rounds runs backwards.
    """
    count = len(names)
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    order = [names[(place + number) % count] for place in zigzag]
    return order[::-1] if count % 2 and number // count % 2 else order
