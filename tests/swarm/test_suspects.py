"""Who is avoided, and for how long."""

from swarm.suspects import SUSPICION_SECONDS, Suspects


def test_the_oldest_is_forgiven_first_but_not_while_it_rests() -> None:
    suspects = Suspects()
    suspects.add("old", 0.0, 10.0)
    suspects.add("young", 1.0, 0.0)
    assert suspects.at(2.0) == ("old", "young")
    assert suspects.forgive_one(2.0)
    assert suspects.at(2.0) == ("old",)
    assert not suspects.forgive_one(2.0)
    assert suspects.forgive_one(11.0)


def test_who_fails_again_becomes_the_youngest() -> None:
    suspects = Suspects()
    suspects.add("a", 0.0, 0.0)
    suspects.add("b", 1.0, 0.0)
    suspects.add("a", 2.0, 0.0)
    assert suspects.at(3.0) == ("b", "a")


def test_a_suspicion_ends_by_itself() -> None:
    suspects = Suspects()
    suspects.add("a", 0.0, 0.0)
    assert suspects.at(SUSPICION_SECONDS - 0.1) == ("a",)
    assert suspects.at(SUSPICION_SECONDS) == ()


def test_who_is_heard_of_lives_and_is_trusted_again_once_it_has_rested() -> None:
    suspects = Suspects()
    suspects.add("a", 0.0, 2.0)
    suspects.heard_of("a", 1.0)
    assert suspects.at(1.0) == ("a",)
    suspects.heard_of("a", 2.0)
    assert suspects.at(2.0) == ()
    suspects.heard_of("nobody", 2.0)
