"""Who is avoided, and for how long."""

from swarm.client import REFRESH_SECONDS
from swarm.suspects import LATE_NEWS_SECONDS, SUSPICION_SECONDS, Suspects


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
    suspects.add("a", 0.0, 12.0)
    suspects.heard_of("a", 11.0)
    assert suspects.at(11.0) == ("a",)
    suspects.heard_of("a", 12.0)
    assert suspects.at(12.0) == ()
    suspects.heard_of("nobody", 12.0)


def test_news_from_before_it_fell_silent_clears_nobody() -> None:
    """A client reads tables now and then: what it reads next may have been said before."""
    suspects = Suspects()
    suspects.add("a", 10.0, 0.0)
    suspects.heard_of("a", 10.0 + REFRESH_SECONDS)
    assert suspects.at(16.0) == ("a",)
    suspects.heard_of("a", 10.0 + LATE_NEWS_SECONDS)
    assert suspects.at(16.0) == ()


def test_who_has_no_room_is_no_suspect_and_is_left_alone_until_the_time_it_named() -> None:
    suspects = Suspects()
    suspects.leave_alone("full", 12.0)
    suspects.leave_alone("full", 11.0)  # what it told another session
    assert suspects.at(10.0) == ()
    assert suspects.full_at(11.9) == {"full": 12.0}
    assert not suspects.forgive_one(11.9), "nobody else being there changes nothing"
    assert suspects.full_at(12.0) == {}
