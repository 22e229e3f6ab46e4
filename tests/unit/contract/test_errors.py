"""An error's message has all that an operator looks for. `tests.unit.test_lists` has the tree."""

from shim.contract import errors


def test_message_has_subject_cause_effect_and_remedy() -> None:
    message = str(errors.CriuRestoreFailed("what", about="abc", why="why", do="Do."))
    assert message == "what [abc]: why; the container starts cold. Do."
