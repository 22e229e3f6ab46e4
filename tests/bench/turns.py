"""Whose turn it is: what one way leaves behind on the machine, another one finds."""

from collections.abc import Sequence


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: over the rounds everyone follows everyone else about as often.

    With an even number of names exactly so (Williams, Experimental designs balanced for the
    estimation of residual effects of treatments, 1949); with an odd one every other cycle of rounds
    runs backwards.
    """
    count = len(names)
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(count)]
    order = [names[(place + number) % count] for place in zigzag]
    return order[::-1] if count % 2 and number // count % 2 else order
